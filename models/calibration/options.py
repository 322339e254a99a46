"""The flags of `tapt-serve calibrate`, with their ranges."""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from models.arguments import number, whole
from models.calibration.prompt_tuning import Tuning
from models.prompts import DESIGNS
from models.shipped import DEFAULT_MODEL, SHIPPED

Kind = Callable[[str], str | float]

PIXELS = "of [0, 1] pixels and below 1: write 2/255 for 2 levels of 255"

TUNING: dict[str, tuple[Kind, str]] = {
    "design": (str, "v: visual prompts; vli: visual and text; vlj: text, and visual made of it"),
    "depth": (whole(1, 48), "layers with prompts; the default is cut to the model's layers"),
    "tokens": (whole(1, 64), "prompts in a layer; for vli, visual ones"),
    "learns": (
        str,
        "prompts to learn; vision: with vli, the text prompts stay the template's words, which "
        "keeps what the model knows of classes that are not learned",
    ),
    "steps": (whole(1), "steps of AdamW"),
    "batch": (whole(2), "images in a step"),
    "rate": (number("in (0, 1), a learning rate", lambda n: 0 < n < 1), "learning rate of AdamW"),
    "warm_up": (whole(0), "steps in which the learning rate rises"),
    "weight_decay": (number("in [0, 1)", lambda n: 0 <= n < 1), "weight decay of AdamW"),
    "epsilon": (
        number(PIXELS, lambda n: 0 <= n < 1),
        "radius of the attack, of [0, 1] pixels; 1/255 is one level",
    ),
    "attack_steps": (whole(1), "PGD steps in each step"),
    "attack_views": (whole(1, 256), "views that the attack's loss is the mean over"),
    "clean_share": (
        number("in [0, 1]", lambda n: 0 <= n <= 1),
        "share of a batch that is not attacked",
    ),
    "views": (whole(1, 256), "views that the loss is the mean over"),
    "seed": (whole(0), "draws the images, the views and the first prompts"),
}
"""The type and help of each field of `Tuning`."""

CHOICES = {"design": sorted(DESIGNS.keys() - {"text"}), "learns": ["all", "vision"]}

LEARNING = [*(name for name in TUNING if name != "seed"), "shots"]
"""What only learning prompts reads: not to be given with `--prompts`."""


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options; exits with an error if some do not go together."""
    parser = make_parser()
    options = parser.parse_args(arguments)
    if options.prompts:
        # Again without these defaults, to tell what was given from what was not.
        bare = make_parser()
        bare.set_defaults(**dict.fromkeys(LEARNING))
        given = vars(bare.parse_args(arguments))
        if useless := [name for name in LEARNING if given[name] is not None]:
            flags = ", ".join(f"--{name.replace('_', '-')}" for name in useless)
            parser.error(f"--prompts takes prompts and attack from that bundle: leave out {flags}")
    return options


def make_parser() -> argparse.ArgumentParser:
    """The command's flags, those that matter first."""
    parser = argparse.ArgumentParser(
        prog="tapt-serve calibrate",
        description="Make a defense bundle for a checkpoint from images. Progress is kept beside "
        "the bundle once a minute and when stopped; the same command resumes.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--data", type=Path, required=True, help="folder or parquet file of labeled images")
    add("--out", type=Path, required=True, help="directory of the new bundle")
    add(
        "--model",
        default=DEFAULT_MODEL,
        help=f"{', '.join(SHIPPED)}, a directory, or a hub id [env: TAPT_MODEL]",
    )
    add(
        "--tokenizer",
        default="",
        help="directory or hub id; default: the model's own [env: TAPT_TOKENIZER]",
    )
    add("--device", default="cpu", help="cpu, cuda or cuda:N")
    add("--shots", type=whole(1), default=16, help="images of each class to learn from")
    add("--images", type=whole(1), default=1000, help="images for statistics and thresholds")
    add("--labels", default="", help="comma-separated class names instead of the data's own")
    add("--prompts", type=Path, help="bundle to take the prompts of, instead of learning some")
    add("--force", action="store_true", help="replace the bundle at --out, if there is one")
    add("--threshold-views", type=whole(2, 256), default=16, help="views of an image")
    add(
        "--false-positive-rate",
        type=number("in (0, 1)", lambda n: 0 < n < 1),
        default=0.05,
        help="share of clean images that count as suspected",
    )
    tuning = parser.add_argument_group("learning")
    for name, value in asdict(Tuning()).items():
        kind, text = TUNING[name]
        choices = CHOICES.get(name)
        flag = f"--{name.replace('_', '-')}"
        tuning.add_argument(flag, type=kind, default=value, choices=choices, help=text)
    return parser
