"""`tapt-serve serve | classify | info | key`, with a flag for each setting of the service.

`bundle`, `calibrate`, `convert`, `harden` and `evaluate` have flags of their own and are passed on
unchanged.
"""

import argparse
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import ValidationError

from service.errors import KeysError, ModelError, ServiceError
from service.settings import PREFIX, Settings, unknown_variables

USAGE_ERROR = 2  # exit status for a wrong flag, variable or argument


class UsageError(Exception):
    """The command line or the environment is wrong; one line per problem."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit status."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if arguments[:1] == ["calibrate"]:
        from models.calibration.calibrate import main as calibrate

        return calibrate(arguments[1:])
    if arguments[:1] == ["bundle"]:
        from models.bundle_command import main as bundle

        return bundle(arguments[1:])
    if arguments[:1] == ["convert"]:
        from models.conversion import main as convert

        return convert(arguments[1:])
    if arguments[:1] == ["harden"]:
        from models.calibration.harden import main as harden

        return harden(arguments[1:])
    if arguments[:1] == ["evaluate"]:
        from models.evaluation.command import main as evaluate

        return evaluate(arguments[1:])
    options = _parser().parse_args(arguments)
    try:
        settings = _settings(options)
        status: int = options.command(options, settings)
        return status
    except UsageError as error:
        print(error, file=sys.stderr)
        return USAGE_ERROR
    except (ServiceError, ModelError, KeysError) as error:
        print(error, file=sys.stderr)
    except OSError as error:
        print(f"{error.filename or 'tapt-serve'}: {error.strerror or error}", file=sys.stderr)
    except KeyboardInterrupt:
        return 130
    return 1


def _serve(options: argparse.Namespace, settings: Settings) -> int:
    from service.server import serve

    try:
        return serve(settings)
    except OSError as error:
        reason = str(error.strerror).partition(" (while")[0]  # the address is printed anyway
        print(f"Cannot listen on {settings.host}:{settings.port}: {reason}.", file=sys.stderr)
        return 1


def _classify(options: argparse.Namespace, settings: Settings) -> int:
    from service import commands
    from service.intake.requests import ClassifyOptions, TextLimits

    body = _body(options)
    try:
        asked = ClassifyOptions.model_validate(body, context=TextLimits.of(settings))
    except ValidationError as error:
        raise UsageError(_lines(error)) from None
    if options.seed is not None:  # at the command line, the user is the operator
        settings = settings.model_copy(update={"allow_client_seed": True})
    if options.url:
        answer = commands.classify_there(options.url, options.image, body, settings)
    else:
        answer = commands.classify_here(options.image, asked, settings)
    if options.json:
        print(answer.model_dump_json(indent=2))
    else:
        commands.show_classification(answer)
    return 0


def _info(options: argparse.Namespace, settings: Settings) -> int:
    from service import commands

    there = options.url
    facts = commands.info_there(there, settings) if there else commands.info_here(settings)
    if options.json:
        import json

        print(json.dumps(facts, indent=2))
    else:
        commands.show_info(facts)
    return 0


def _key(options: argparse.Namespace, settings: Settings) -> int:
    """Print the line for the key file to stdout, and a new key, once, to stderr."""
    from service.http.authentication import DIAGNOSTICS, entry, make_key

    key = sys.stdin.readline().strip() if options.stdin else make_key()
    if len(key.split()) != 1:
        raise UsageError("Standard input must hold a key, which is one word.")
    print(entry(key, [DIAGNOSTICS] if options.diagnostics else []), flush=True)
    if not options.stdin:
        print(f"The key, which is not stored: {key}", file=sys.stderr)
    return 0


def _body(options: argparse.Namespace) -> dict[str, Any]:
    """The request, without the image. Flags that were not given are left to the server."""
    labels = options.labels
    given = {name: getattr(options, name, None) for name in ("method", "readout")}
    given |= {name: _int(getattr(options, name, None)) for name in ("steps", "views")}
    defense = {name: value for name, value in given.items() if value is not None}
    if options.seed is not None:
        defense["seed"] = options.seed
    body: dict[str, Any] = {"candidate_labels": labels[0] if len(labels) == 1 else labels}
    if defense:
        body["defense"] = defense
    if options.top_k is not None:
        body["top_k"] = options.top_k
    if template := getattr(options, "hypothesis_template", None):
        body["hypothesis_template"] = template
    return body


def _int(text: str | None) -> int | None:
    return None if text is None else int(text)  # validated by Settings


def _settings(options: argparse.Namespace) -> Settings:
    if unknown := unknown_variables():
        raise UsageError(f"Unknown variable: {', '.join(unknown)}; see docs/configuration.md.")
    given = vars(options)
    try:
        return Settings(**{name: given[name] for name in Settings.model_fields if name in given})
    except ValidationError as error:
        raise UsageError(_lines(error)) from None


def _lines(error: ValidationError) -> str:
    """One line per problem, without the values, which may be keys."""
    lines = []
    for problem in error.errors(include_url=False, include_input=False, include_context=False):
        what = problem["msg"].removeprefix("Value error, ")
        where = ".".join(map(str, problem["loc"]))
        if where in Settings.model_fields:
            where = f"{_flag(where)} ({PREFIX}{where.upper()})"
        lines.append(f"{where}: {what}" if where else what)
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tapt-serve",
        description="Zero-shot image classification that defends itself at test time.",
    )
    parser.add_argument("--version", action="version", version=version("tapt-serve"))
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    serve = commands.add_parser(
        "serve", help="serve the model over HTTP", usage="%(prog)s [--KNOB VALUE ...]"
    )
    serve.set_defaults(command=_serve)

    classify = commands.add_parser(
        "classify",
        help="classify one image",
        usage="%(prog)s IMAGE --labels LABELS [--json] [--url URL] [--KNOB VALUE ...]",
    )
    classify.set_defaults(command=_classify)
    classify.add_argument("image", type=Path, metavar="IMAGE")
    classify.add_argument(
        "--labels",
        action="append",
        required=True,
        help="comma-separated, or given once for each label",
    )
    classify.add_argument("--top-k", type=int, help="how many labels to show")
    classify.add_argument("--seed", type=int, help="seed of the random views; random by default")

    info = commands.add_parser(
        "info",
        help="show the model and its limits",
        usage="%(prog)s [--json] [--url URL] [--KNOB VALUE ...]",
    )
    info.set_defaults(command=_info)

    key = commands.add_parser("key", help="make an API key and its line for the key file")
    key.set_defaults(command=_key)
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
    for command in (serve, classify, info):
        _add_knobs(command)
    return parser


def _add_knobs(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("knobs")
    for name, field in Settings.model_fields.items():
        default = "none" if field.default in ("", ()) else field.default
        text = f"{field.description} [default: {default}; env: {PREFIX}{name.upper()}]"
        options: dict[str, Any] = {"help": text.replace("%", "%%"), "default": argparse.SUPPRESS}
        if isinstance(field.default, bool):
            options["action"] = argparse.BooleanOptionalAction
        else:
            literal = get_origin(field.annotation) is Literal
            options["metavar"] = "|".join(get_args(field.annotation)) if literal else "VALUE"
        group.add_argument(_flag(name), **options)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


if __name__ == "__main__":
    sys.exit(main())
