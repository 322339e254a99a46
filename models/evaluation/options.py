"""The flags of `tapt-serve evaluate`, and the protocol that they name."""

import argparse
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

from models.arguments import number, whole
from models.attacks import ATTACKS, strong
from models.attacks.attack import LEVELS, Budget
from models.attacks.threats import THREATS
from models.classifier import DEFAULT_TEMPLATE
from models.defenses.catalog import DEFENSES, READOUTS
from models.evaluation.journal import CLEAN
from models.evaluation.sample import Shard
from models.evaluation.trial import BY_QUERIES, Protocol
from models.images.preprocess import AREA
from models.shipped import DEFAULT_MODEL, SHIPPED
from models.tapt import ADAPTS

DEFAULTS: dict[str, Any] = {"attack_steps": 20, "queries": 500, "answers": 1, "queried": None}
STRONG_DEFAULTS: dict[str, Any] = {
    "attack_steps": strong.STEPS,
    "queries": strong.QUERIES,
    "answers": strong.ANSWERS,
    "queried": strong.QUERIED,
}
"""Defaults of these options without the recipe `strong`, and with it."""


def read_area(given: Sequence[str]) -> tuple[float, float]:
    """Raises ValueError unless the two shares can bound a crop."""
    area = [float(text) for text in given]
    if len(area) != 2 or not 0 < area[0] <= area[1] <= 1:
        raise ValueError("--view-area: two shares in (0, 1], the smaller one first")
    return area[0], area[1]


def read_protocol(options: argparse.Namespace) -> Protocol:
    """The protocol that the options describe.

    Raises:
        ValueError: a name is unknown, an epsilon out of range, or images would not be attacked.
    """
    known = {
        "--defenses": (options.defenses, list(DEFENSES)),
        "--threats": (options.threats, [CLEAN, *THREATS]),
        "--attacks": (options.attacks, [*ATTACKS, "strong"]),
    }
    for flag, (given, names) in known.items():
        if strange := [name for name in given if name not in names]:
            raise ValueError(f"{flag}: unknown {', '.join(strange)}; known: {', '.join(names)}")
    attacks = [
        n for name in options.attacks for n in (strong.RECIPE if name == "strong" else [name])
    ]
    defaults = STRONG_DEFAULTS if "strong" in options.attacks else DEFAULTS
    chosen = defaults | {n: value for n in defaults if (value := getattr(options, n)) is not None}
    protocol = Protocol(
        options.defenses,
        options.threats,
        list(dict.fromkeys(attacks)),
        [read_levels(text) for text in options.eps],
        Budget(
            epsilon=0,
            steps=chosen["attack_steps"],
            restarts=options.restarts,
            draws=options.eot,
            targets=options.targets,
            queries=chosen["queries"],
        ),
        options.views,
        options.steps,
        options.readout,
        options.seed,
        options.batch,
        chosen["answers"],
        chosen["queried"],
    )
    check_attacks(protocol, options.limit)
    return protocol


def check_attacks(protocol: Protocol, limit: int | None) -> None:
    """Raises ValueError if a threat's attacks leave images out, which would count as robust.

    `limit` is the size of the sample, None for all images.
    """
    given = ", ".join(protocol.attacks)
    some = protocol.queried is not None and (limit is None or protocol.queried < limit)
    for threat in protocol.threats:
        if threat == CLEAN:
            continue
        attacks = protocol.attacks_of(threat)
        if not attacks:
            alone = [name for name, part in strong.STRONG.items() if part.alone]
            raise ValueError(
                f"--threats {threat}: none of the attacks {given} is made on a single view; add "
                f"{' or '.join(alone)} to --attacks, or leave out {threat}"
            )
        if some and all(attack in BY_QUERIES for attack in attacks):
            raise ValueError(
                f"--threats {threat}: of the attacks {given}, only {', '.join(attacks)} would be "
                f"made, and only on {protocol.queried} images; leave out --queried or add an attack"
            )


def read_levels(text: str) -> float:
    """An epsilon of `--eps` in levels of 1/255. Raises ValueError unless it is a whole number."""
    try:
        levels = Fraction(text) * LEVELS
    except (ValueError, ZeroDivisionError):
        raise ValueError(f"--eps: {text} is not a number") from None
    if levels.denominator > 1 or not 1 <= levels < LEVELS:
        raise ValueError(
            f"--eps: {text} is not a whole number of levels of an 8-bit image, from 1/{LEVELS} to "
            f"{LEVELS - 1}/{LEVELS}: write 2/{LEVELS} for two levels"
        )
    return float(levels)


def read_shard(text: str) -> Shard:
    """`2/8` is the third of eight shards."""
    index, slash, of = text.partition("/")
    if not (slash and index.isdecimal() and of.isdecimal() and int(index) < int(of)):
        raise argparse.ArgumentTypeError(f"{text} is not I/N with I from 0 to N-1")
    return Shard(int(index), int(of))


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options; exits with a sentence where they do not go together."""
    flags = parser()
    options = flags.parse_args(arguments)
    if options.merge:
        usual = vars(flags.parse_args(["--merge", ".", "--json", "."]))
        # TAPT_MODEL and TAPT_TOKENIZER may have given the last two.
        own = {"merge", "json", "model", "tokenizer"}
        for name, value in vars(options).items():
            if name not in own and value != usual[name]:
                flags.error(f"--merge takes only --json, not --{name.replace('_', '-')}")
    return options


def parser() -> argparse.ArgumentParser:
    """The command's flags."""
    flags = argparse.ArgumentParser(
        prog="tapt-serve evaluate",
        description="Measure defenses under attack and write the table.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    lists: dict[str, Any] = {"type": lambda text: text.split(","), "metavar": "NAME,..."}
    add = flags.add_argument
    source = flags.add_mutually_exclusive_group(required=True).add_argument
    source("--data", help="folder or parquet file of labeled images, or a datasets id")
    source(
        "--merge",
        type=Path,
        nargs="+",
        metavar="DIR",
        help="make one evaluation of shards: their JSON files or directories; takes only --json",
    )
    add("--json", type=Path, required=True, metavar="OUT", help="JSON file to write")
    add("--limit", type=whole(1), help="size of a random sample of the images; all if absent")
    add(
        "--shard",
        type=read_shard,
        default="0/1",
        metavar="I/N",
        help="attack only every Nth image from the one at place I on, from 0 to N-1; see --merge",
    )
    add("--labels", default="", help="comma-separated class names instead of the data's own")
    add("--defenses", default="plain,ensemble,tapt", help=",".join(DEFENSES), **lists)
    add("--threats", default="clean,transfer", help=",".join([CLEAN, *THREATS]), **lists)
    add(
        "--attacks",
        default="pgd,apgd,square",
        help=f"{','.join(ATTACKS)}; pgd is a quick look; strong, for figures to rely on, is "
        f"{','.join(strong.RECIPE)} and takes up to {strong.COST} per image, before queries",
        **lists,
    )
    add(
        "--eps",
        default="2/255",
        help="whole levels of 8-bit images",
        **{**lists, "metavar": "E,..."},
    )
    add("--seed", type=whole(0), default=0, help="draws the sample, starting points and views")
    add("--batch", type=whole(1), default=8, help="images in one batch")
    add("--preflight", type=whole(0), default=0, help="images to check for masked gradients first")
    pair: dict[str, Any] = {**lists, "metavar": "LEAST,MOST"}
    model = flags.add_argument_group("model and defense").add_argument
    model(
        "--model",
        default=DEFAULT_MODEL,
        help=f"{', '.join(SHIPPED)}, a directory, or a hub id [env: TAPT_MODEL]",
    )
    model(
        "--tokenizer",
        default="",
        help="directory or hub id; default: the model's own [env: TAPT_TOKENIZER]",
    )
    model("--bundle", type=Path, help="default: the one beside the model, if any")
    model("--device", default="cpu", help="cpu, cuda or cuda:N")
    model(
        "--dtype", default="float32", choices=["float32", "bfloat16", "float16"], help="precision"
    )
    model("--template", default=DEFAULT_TEMPLATE, help="template without learned prompts")
    model("--views", type=whole(1), default=16, help="views per image")
    model("--view-area", default=AREA, help="share of the image in a view", **pair)
    model("--steps", type=whole(0), default=1, help="adaptation steps")
    model("--readout", default="all", choices=READOUTS, help="views that the answer is read from")
    above = number("above 0", lambda n: n > 0)
    model("--learning-rate", type=above, default=5e-4, help="AdamW's learning rate")
    model(
        "--entropy",
        default="of-mean",
        choices=["of-mean", "mean-of"],
        help="over kept views",
    )
    model("--adapts", default="vision", choices=ADAPTS, help="which prompts adapt")
    model(
        "--selection-ratio",
        type=number("in (0, 1]", lambda n: 0 < n <= 1),
        default=0.1,
        help="share of the views kept for the loss",
    )
    model(
        "--alignment-weight",
        type=number("of at least 0", lambda n: n >= 0),
        default=100.0,
        help="against the entropy",
    )
    model(
        "--gamma",
        type=number("in [0, 1]", lambda n: 0 <= n <= 1),
        default=0.5,
        help="share of the adversarial statistics",
    )
    attack = flags.add_argument_group("attack").add_argument
    attack(
        "--attack-steps",
        type=whole(1),
        help=f"steps of a gradient attack; 20, or {strong.STEPS} with strong",
    )
    attack(
        "--answers",
        type=whole(1),
        help="answers of a random defense to each image, with other draws; 1, or "
        f"{strong.ANSWERS} with strong",
    )
    attack("--restarts", type=whole(1), default=1, help="random restarts of an attack")
    attack("--eot", type=whole(1), default=1, help="draws of views to average gradients over")
    attack("--targets", type=whole(0), default=3, help="classes that APGD aims at")
    attack(
        "--queries",
        type=whole(1),
        help=f"queries of square and rays; 500, or {strong.QUERIES} with strong",
    )
    attack(
        "--queried",
        type=whole(0),
        metavar="N",
        help=f"images that square and rays attack; all, or {strong.QUERIED} with strong",
    )
    attack(
        "--check",
        action="store_true",
        help="afterwards, check that twice the steps (of square or rays, the queries) break "
        "less than 2 points more and that a large epsilon leaves nothing",
    )
    return flags
