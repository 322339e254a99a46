"""The flags of `tapt-serve evaluate`, and the protocol that they name."""

import argparse
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

from models.attacks import ATTACKS, strong
from models.attacks.attack import LEVELS, Budget
from models.attacks.threats import THREATS
from models.classifier import DEFAULT_TEMPLATE
from models.defenses.catalog import DEFENSES, READOUTS
from models.evaluation.journal import CLEAN
from models.evaluation.sample import Shard
from models.evaluation.trial import Protocol
from models.images.preprocess import AREA
from models.shipped import DEFAULT_MODEL, SHIPPED
from models.tapt import ADAPTS


def read_area(given: Sequence[str]) -> tuple[float, float]:
    """Raises ValueError unless the two shares can bound a crop."""
    area = [float(text) for text in given]
    if len(area) != 2 or not 0 < area[0] <= area[1] <= 1:
        raise ValueError("--view-area: two shares in (0, 1], the smaller one first")
    return area[0], area[1]


def read_protocol(options: argparse.Namespace) -> Protocol:
    """Raises ValueError for an unknown name or a number out of range."""
    known = {
        "--defenses": (options.defenses, list(DEFENSES)),
        "--threats": (options.threats, [CLEAN, *THREATS]),
        "--attacks": (options.attacks, [*ATTACKS, "strong"]),
    }
    for flag, (given, names) in known.items():
        if strange := [name for name in given if name not in names]:
            raise ValueError(f"{flag}: unknown {', '.join(strange)}; known: {', '.join(names)}")
    try:
        epsilons = [float(Fraction(text) * LEVELS) for text in options.eps]
    except ZeroDivisionError:
        raise ValueError("--eps: a fraction by zero") from None
    if min(epsilons) < 1:
        raise ValueError("--eps: below 1/255, one level of an 8-bit picture")
    if max(epsilons) >= LEVELS:
        raise ValueError("--eps: of [0, 1] pixels and below 1: write 2/255 for 2 levels of 255")
    recipe = "strong" in options.attacks
    attacks = [
        n for name in options.attacks for n in (strong.RECIPE if name == "strong" else [name])
    ]
    budget = Budget(
        epsilon=0,
        steps=options.attack_steps or (strong.STEPS if recipe else 20),
        restarts=options.restarts,
        draws=options.eot,
        targets=options.targets,
        queries=options.queries or (strong.QUERIES if recipe else 500),
    )
    return Protocol(
        options.defenses,
        options.threats,
        list(dict.fromkeys(attacks)),
        epsilons,
        budget,
        options.views,
        options.steps,
        options.readout,
        options.seed,
        options.batch,
        options.answers or (strong.ANSWERS if recipe else 1),
        options.queried or (strong.QUERIED if recipe else None),
    )


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
    add("--limit", type=int, help="size of a random sample of the images; all if absent")
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
        help="of [0, 1] pixels",
        **{**lists, "metavar": "E,..."},
    )
    add("--seed", type=int, default=0, help="draws the sample, starting points and views")
    add("--batch", type=int, default=8, help="images in one batch")
    add("--preflight", type=int, default=0, help="images to check for masked gradients first")
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
    model("--views", type=int, default=16, help="views per image")
    model("--view-area", default=AREA, help="share of the image in a view", **pair)
    model("--steps", type=int, default=1, help="adaptation steps")
    model("--readout", default="all", choices=READOUTS, help="views that the answer is read from")
    model("--learning-rate", type=float, default=5e-4, help="AdamW's learning rate")
    model(
        "--entropy",
        default="of-mean",
        choices=["of-mean", "mean-of"],
        help="over kept views",
    )
    model("--adapts", default="vision", choices=ADAPTS, help="which prompts adapt")
    model("--selection-ratio", type=float, default=0.1, help="share of the views kept for the loss")
    model(
        "--alignment-weight",
        type=float,
        default=100.0,
        help="against the entropy",
    )
    model(
        "--gamma",
        type=float,
        default=0.5,
        help="share of the adversarial statistics",
    )
    attack = flags.add_argument_group("attack").add_argument
    attack(
        "--attack-steps",
        type=int,
        help=f"steps of a gradient attack; 20, or {strong.STEPS} with strong",
    )
    attack(
        "--answers",
        type=int,
        help="answers of a random defense to each image, with other draws; 1, or "
        f"{strong.ANSWERS} with strong",
    )
    attack("--restarts", type=int, default=1, help="random restarts of an attack")
    attack("--eot", type=int, default=1, help="draws of views to average gradients over")
    attack("--targets", type=int, default=3, help="classes that APGD aims at")
    attack(
        "--queries",
        type=int,
        help=f"queries of square and rays; 500, or {strong.QUERIES} with strong",
    )
    attack(
        "--queried",
        type=int,
        metavar="N",
        help=f"images that square and rays attack; all, or {strong.QUERIED} with strong",
    )
    attack(
        "--check",
        action="store_true",
        help="afterwards, check that twice the steps break less than 2 points more and that a "
        "large epsilon leaves nothing",
    )
    return flags
