"""Show a defense bundle, or push it to the Hugging Face hub.

tapt-serve bundle show BUNDLE
tapt-serve bundle push DIR OWNER/NAME [--private]
"""

import argparse
import json
import sys
from pathlib import Path

from huggingface_hub import HfApi

from models.bundle import FOLDER, JSON, TENSORS, find_bundle, read_bundle
from models.errors import LoadError, first_line


def show(options: argparse.Namespace) -> str:
    """What a bundle says of itself and the shapes of its prompts, as JSON. Raises LoadError."""
    bundle = read_bundle(find_bundle(options.bundle))
    shapes = {name: list(value.shape) for name, value in bundle.prompts.tensors.items()}
    return json.dumps({**bundle.describe(), "prompts": shapes}, indent=2)


def push(options: argparse.Namespace) -> str:
    """Upload a bundle; the setting that uses it.

    Raises:
        LoadError: the bundle is damaged, or the hub refuses it.
    """
    read_bundle(options.directory)
    hub = HfApi()
    try:
        hub.create_repo(options.repository, private=options.private, exist_ok=True)
        commit = hub.upload_folder(
            repo_id=options.repository,
            folder_path=options.directory,
            path_in_repo=FOLDER,
            allow_patterns=[JSON, TENSORS],
            commit_message=options.message,
            revision=options.revision or None,
        )
    except Exception as error:  # of the hub, of its client, and of the network below it
        raise LoadError(
            f"the bundle cannot be pushed to {options.repository}: {first_line(error)}"
        ) from error
    return f"TAPT_BUNDLE={options.repository}@{commit.oid}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tapt-serve bundle", description="Show a defense bundle, or push it to the hub."
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    shown = commands.add_parser("show", help="print what a bundle says of itself, as JSON")
    shown.set_defaults(command=show)
    shown.add_argument("bundle", metavar="BUNDLE", help="a directory, or owner/name[@revision]")
    pushed = commands.add_parser("push", help="upload a bundle to a model repository")
    pushed.set_defaults(command=push)
    pushed.add_argument("directory", metavar="DIR", type=Path, help="directory of the bundle")
    pushed.add_argument("repository", metavar="OWNER/NAME", help="repository; created if missing")
    pushed.add_argument(
        "--private", action="store_true", help="if the repository is created, make it private"
    )
    pushed.add_argument("--revision", default="", help="branch to push to [default: main]")
    pushed.add_argument("--message", default="Add a defense bundle", help="of the commit")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command; the exit status."""
    options = _parser().parse_args(argv)
    try:
        print(options.command(options))
    except LoadError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
