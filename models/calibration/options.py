"""The flags of `tapt-serve calibrate`, with their ranges; `read_number` is for `harden` too."""

import argparse
from collections.abc import Callable
from dataclasses import asdict
from fractions import Fraction
from pathlib import Path

from models.calibration.prompt_tuning import Tuning
from models.prompts import DESIGNS
from models.shipped import DEFAULT_MODEL, SHIPPED

Kind = Callable[[str], str | float]


def read_number(text: str) -> float:
    """A number, or a fraction such as 2/255. Raises ValueError."""
    try:
        return float(Fraction(text))
    except ZeroDivisionError as error:
        raise ValueError(str(error)) from error


def whole(least: int, most: int | None = None) -> Kind:
    """A whole number in a range, ends included."""

    def read(text: str) -> int:
        number = int(text)
        if number < least or (most is not None and number > most):
            span = f"at least {least}" if most is None else f"from {least} to {most}"
            raise argparse.ArgumentTypeError(f"{text} is not a whole number {span}")
        return number

    return read


def share(name: str = "in [0, 1)", *, zero: bool = True, one: bool = False) -> Kind:
    """A number or fraction from 0 to 1, such as 2/255; 0 only if `zero`, 1 only if `one`."""

    def read(text: str) -> float:
        number = read_number(text)
        if not (0 <= number <= 1) or (number == 0 and not zero) or (number == 1 and not one):
            raise argparse.ArgumentTypeError(f"{text} is not {name}")
        return number

    return read


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
    "rate": (share("a learning rate in (0, 1)", zero=False), "learning rate of AdamW"),
    "warm_up": (whole(0), "steps in which the learning rate rises"),
    "weight_decay": (share(), "weight decay of AdamW"),
    "epsilon": (share(PIXELS), "radius of the attack, of [0, 1] pixels; 1/255 is one level"),
    "attack_steps": (whole(1), "PGD steps in each step"),
    "attack_views": (whole(1, 256), "views that the attack's loss is the mean over"),
    "clean_share": (share("in [0, 1]", one=True), "share of a batch that is not attacked"),
    "views": (whole(1, 256), "views that the loss is the mean over"),
    "seed": (whole(0), "draws the images, the views and the first prompts"),
}
"""The type and help of each field of `Tuning`."""

CHOICES = {"design": sorted(DESIGNS.keys() - {"text"}), "learns": ["all", "vision"]}


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
        type=share("in (0, 1)", zero=False),
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
