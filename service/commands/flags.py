"""The flags of `tapt-serve`, with one for each setting."""

import argparse
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from service.settings import CLIENT_KEY, PREFIX, Settings

FIRST_SETTINGS = {
    "serve": ("host", "port", "model", "bundle", "device", "method", "views", "steps", "api_keys"),
    "classify": ("model", "bundle", "device", "method", "views", "steps", "readout"),
    "info": ("model", "bundle", "device"),
}
"""What a help page shows before all others."""


def make_parser() -> argparse.ArgumentParser:
    """The commands and their flags; `command` is the name of the one that was given."""
    parser = argparse.ArgumentParser(
        prog="tapt-serve",
        description="Zero-shot image classification that defends itself at test time.",
    )
    parser.add_argument("--version", action="version", version=version("tapt-serve"))
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    serve = commands.add_parser(
        "serve", help="serve the model over HTTP", usage="%(prog)s [--SETTING VALUE ...]"
    )
    serve.set_defaults(command="serve")

    classify = commands.add_parser(
        "classify",
        help="classify images",
        usage="%(prog)s IMAGE|DIRECTORY|- ... --labels LABELS [--output FILE] [--url URL] "
        "[--SETTING VALUE ...]",
        description="Classify one image and show a table; or several, and write a line of JSON for "
        "each, in their order.",
        epilog="Exit status: 0; 1 if an image failed, whose line then holds an error; 2 for a "
        "wrong flag.",
    )
    classify.set_defaults(command="classify")
    classify.add_argument(
        "images",
        nargs="+",
        metavar="IMAGE",
        help="an image file, a directory with images, or - for a list of files on standard input",
    )
    classify.add_argument(
        "--labels",
        action="append",
        required=True,
        help="comma-separated, or given once for each label",
    )
    classify.add_argument(
        "--template",
        action="append",
        help="prompt around a label, with one {}; given several times, the mean counts",
    )
    classify.add_argument("--top-k", type=int, help="how many labels to show")
    classify.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="write the lines of JSON there; the same command resumes and tries failed files again",
    )
    classify.add_argument(
        "--concurrency",
        type=_positive,
        metavar="N",
        help="images at once [default: a batch for each worker]",
    )
    classify.add_argument("--seed", type=int, help="seed of the random views; random by default")

    info = commands.add_parser(
        "info",
        help="show the model and its limits",
        usage="%(prog)s [--json] [--url URL] [--SETTING VALUE ...]",
    )
    info.set_defaults(command="info")

    key = commands.add_parser("key", help="make an API key and its line for the key file")
    key.set_defaults(command="key")
    key.add_argument("--diagnostics", action="store_true", help="let the key see diagnostics")
    key.add_argument("--stdin", action="store_true", help="read the key from standard input")

    commands.add_parser("calibrate", help="make a defense bundle for a checkpoint from images")
    commands.add_parser("bundle", help="show a defense bundle, or push it to the hub")
    commands.add_parser("convert", help="convert a checkpoint to safetensors for transformers")
    commands.add_parser("harden", help="fine-tune a checkpoint against attacks")
    commands.add_parser("evaluate", help="evaluate defenses under attack")

    for command in (classify, info):
        command.add_argument("--json", action="store_true", help="print JSON")
        command.add_argument("--url", help="URL of a running server to use")
        command.add_argument("--key", help=f"API key for that server [env: {CLIENT_KEY}]")
    for name, command in (("serve", serve), ("classify", classify), ("info", info)):
        first = FIRST_SETTINGS[name]
        _add_settings(command, "settings", first)
        others = [name for name in Settings.model_fields if name not in first]
        _add_settings(command, "other settings", others)
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def _add_settings(parser: argparse.ArgumentParser, title: str, names: Sequence[str]) -> None:
    group = parser.add_argument_group(title)
    for name in names:
        field = Settings.model_fields[name]
        default = "none" if field.default in ("", ()) else field.default
        text = f"{field.description} [default: {default}; env: {PREFIX}{name.upper()}]"
        options: dict[str, Any] = {"help": text.replace("%", "%%"), "default": argparse.SUPPRESS}
        if isinstance(field.default, bool):
            options["action"] = argparse.BooleanOptionalAction
        else:
            literal = get_origin(field.annotation) is Literal
            options["metavar"] = "|".join(get_args(field.annotation)) if literal else "VALUE"
        group.add_argument(flag(name), **options)


def flag(name: str) -> str:
    """The flag of a setting."""
    return "--" + name.replace("_", "-")
