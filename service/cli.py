"""`tapt-serve serve | classify | info | key`, with a flag for each setting of the service.

`bundle`, `calibrate`, `convert`, `harden` and `evaluate` have flags of their own and are passed on
unchanged.
"""

import argparse
import asyncio
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from service.commands.flags import flag, make_parser
from service.errors import KeysError, ModelError, ServiceError
from service.settings import (
    CLIENT_KEY,
    PREFIX,
    Settings,
    injected_variables,
    unknown_variables,
)

if TYPE_CHECKING:
    from service.intake.requests import ClassifyOptions

USAGE_ERROR = 2  # exit status for a wrong flag, variable or argument

ANSWER_SETTINGS = {
    "model", "model_revision", "tokenizer", "quick_gelu", "bundle", "design", "method", "steps",
    "views", "readout", "tier", "selection_ratio", "learning_rate", "alignment_weight", "gamma",
    "adapts", "early_stop", "hypothesis_template",
}  # fmt: skip
"""Knobs that change answers: lines of JSON made with others are not resumed."""


class UsageError(Exception):
    """The command line or the environment is wrong; one line per problem."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit status."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    command, rest = arguments[:1], _with_variables(arguments[1:])
    if command == ["calibrate"]:
        from models.calibration.calibrate import main as calibrate

        return calibrate(rest)
    if command == ["bundle"]:
        from models.bundle_command import main as bundle

        return bundle(arguments[1:])
    if command == ["convert"]:
        from models.conversion import main as convert

        return convert(arguments[1:])
    if command == ["harden"]:
        from models.calibration.harden import main as harden

        return harden(rest)
    if command == ["evaluate"]:
        from models.evaluation.command import main as evaluate

        return evaluate(rest)
    options = make_parser().parse_args(arguments)
    try:
        settings = _settings(options)
        return _COMMANDS[options.command](options, settings)
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


def _with_variables(arguments: list[str]) -> list[str]:
    """The arguments with `--model` and `--tokenizer` from the environment where they name none.

    A tokenizer goes with its model: with a `--model`, its variable is ignored.
    """
    named = {argument.partition("=")[0] for argument in arguments}
    if "--model" in named:
        return arguments
    found = []
    for name in ("model", "tokenizer"):
        value = os.environ.get(PREFIX + name.upper())
        if value and flag(name) not in named:
            found += [flag(name), value]
    return [*found, *arguments]


def _serve(options: argparse.Namespace, settings: Settings) -> int:
    from service.server import serve

    try:
        return serve(settings)
    except OSError as error:
        reason = str(error.strerror).partition(" (while")[0]  # the address is printed anyway
        print(f"Cannot listen on {settings.host}:{settings.port}: {reason}.", file=sys.stderr)
        return 1


def _classify(options: argparse.Namespace, settings: Settings) -> int:
    from service.commands import terminal
    from service.intake.requests import ClassifyOptions, TextLimits

    many = options.output or len(options.images) > 1 or _is_list(options.images[0])
    body = _body(options)
    try:
        asked = ClassifyOptions.model_validate(body, context=TextLimits.of(settings))
    except ValidationError as error:
        raise UsageError(_lines(error)) from None
    if options.seed is not None:  # at the command line, the user is the operator
        settings = settings.model_copy(update={"allow_client_seed": True})
    if many:
        return _classify_many(options, body, asked, settings)
    image = Path(options.images[0])
    if options.url:
        key = _find_key(options, settings)
        answer = terminal.classify_there(options.url, key, image, body)
    else:
        answer = terminal.classify_here(image, asked, settings)
    if options.json:
        print(answer.model_dump_json(indent=2))
    else:
        terminal.show_classification(answer)
    return 0


def _is_list(source: str) -> bool:
    return source == "-" or Path(source).is_dir()


def _classify_many(
    options: argparse.Namespace, body: dict[str, Any], asked: "ClassifyOptions", settings: Settings
) -> int:
    from service.commands import many

    names = many.find_images(options.images, sys.stdin.buffer)
    if not names:
        raise UsageError(f"{', '.join(options.images)}: there are no images.")
    at_once = options.concurrency or settings.max_batch_size * settings.workers
    if options.url:
        question = {"url": options.url, **body}
        backend = many.remote(options.url, _find_key(options, settings), body, at_once)
    else:
        question = {**body, **settings.model_dump(include=ANSWER_SETTINGS)}
        backend = many.local(settings, asked)

    async def run() -> int:
        async with backend as classify:
            return await many.run(names, classify, output, at_once)

    try:
        output = many.Output(options.output, question)
    except ValueError as error:
        raise UsageError(error) from None
    try:
        with output:
            failed = asyncio.run(run())
    except (KeyboardInterrupt, ConnectionError):
        if options.output:
            print("Interrupted. The same command resumes.", file=sys.stderr)
        raise
    if failed:
        print(f"{failed} of {len(names)} files failed.", file=sys.stderr)
    return 1 if failed else 0


def _find_key(options: argparse.Namespace, settings: Settings) -> str:
    """The key to send: the flag's, the environment's, or the server's first that is no hash. Raises
    UsageError if no header can hold it."""
    plain = (key.split()[0] for key in settings.api_keys if not key.startswith("sha256:"))
    key = str(options.key or os.environ.get(CLIENT_KEY) or next(plain, ""))
    if not key.isascii():
        raise UsageError("The key to send is not ASCII.")
    return key


def _info(options: argparse.Namespace, settings: Settings) -> int:
    from service.commands import terminal

    if options.url:
        facts = terminal.info_there(options.url, _find_key(options, settings))
    else:
        facts = terminal.info_here(settings)
    if options.json:
        import json

        print(json.dumps(facts, indent=2))
    else:
        terminal.show_info(facts)
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
    if template := options.template or getattr(options, "hypothesis_template", None):
        body["hypothesis_template"] = template
    return body


def _int(text: str | None) -> int | None:
    return None if text is None else int(text)  # validated by Settings


def _settings(options: argparse.Namespace) -> Settings:
    if injected := injected_variables():
        raise UsageError(
            f"Kubernetes set {', '.join(injected)} for a Service whose name begins with `tapt`. "
            "These look like settings: set `enableServiceLinks: false` in the pod's spec, or "
            "rename the Service."
        )
    unknown = unknown_variables()
    if hasattr(options, "url") and CLIENT_KEY in unknown:
        unknown.remove(CLIENT_KEY)
    elif CLIENT_KEY in unknown:
        raise UsageError(
            f"{CLIENT_KEY} is the key of a client; the keys that a server accepts are in "
            f"{PREFIX}API_KEYS."
        )
    if unknown:
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
            where = f"{flag(where)} ({PREFIX}{where.upper()})"
        lines.append(f"{where}: {what}" if where else what)
    return "\n".join(lines)


_COMMANDS: Mapping[str, Callable[[argparse.Namespace, Settings], int]] = {
    "serve": _serve,
    "classify": _classify,
    "info": _info,
    "key": _key,
}


if __name__ == "__main__":
    sys.exit(main())
