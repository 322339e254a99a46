"""Write a checkpoint of any known format as a `CLIPModel` directory with safetensors weights.

    tapt-serve convert SRC DIR [--tokenizer TOKENIZER]

This is the only command that reads pickled weights, and it does so with `weights_only=True`, which
runs none of the code that a pickle may hold. The server never reads them.
"""

import argparse
import sys
from pathlib import Path

import torch

from models.checkpoint import CheckpointSource, build_clip, find_checkpoint
from models.errors import LoadError
from models.export import exact_dtype, write_checkpoint
from models.tokenizer import has_tokenizer, load_tokenizer


def convert(options: argparse.Namespace) -> str:
    """Convert as the options say; what was written, in one sentence.

    Raises:
        LoadError: the source cannot be used, or the target holds files.
    """
    out: Path = options.directory
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise LoadError(f"{out} is not an empty directory; remove it or name another")
    source = find_checkpoint(options.source, options.revision, options.quick_gelu, pickled=True)
    model = build_clip(source, torch.device("cpu")).model
    tokenizer = None
    if options.tokenizer or has_tokenizer(source.directory):
        text = source.config.text_config
        tokenizer = load_tokenizer(
            source.name, source.directory, text.vocab_size, text.eos_token_id, options.tokenizer
        )
    dtype = exact_dtype(model)
    write_checkpoint(model.to(dtype), tokenizer, source.preprocessing, out, {})
    return _describe(source, out, dtype, tokenizer is not None)


def _describe(source: CheckpointSource, out: Path, dtype: torch.dtype, tokenizer: bool) -> str:
    count = sum(1 for _ in out.iterdir())
    written = (
        f"{out} holds {source.name} as a CLIPModel in {str(dtype).removeprefix('torch.')} "
        f"({count} files, from {', '.join(file.name for file in source.files)})"
    )
    if tokenizer:
        return f"{written}."
    return f"{written} without a tokenizer: set TAPT_TOKENIZER to serve it."


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tapt-serve convert",
        description="Convert a CLIP checkpoint to a directory that transformers loads.",
    )
    parser.add_argument("source", metavar="SRC", help="a directory or a hub id")
    parser.add_argument("directory", metavar="DIR", type=Path, help="directory to write")
    parser.add_argument(
        "--tokenizer",
        default="",
        help="directory or hub id of the tokenizer [default: that of SRC, if any]",
    )
    parser.add_argument("--revision", default="", help="commit, tag or branch of a hub id")
    parser.add_argument(
        "--quick-gelu",
        action=argparse.BooleanOptionalAction,
        help="the activation: CLIP's approximate GELU or the exact one [default: as SRC says]",
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command; the exit status."""
    options = _parser().parse_args(argv)
    try:
        print(convert(options))
    except LoadError as error:
        print(error, file=sys.stderr)
        return 1
    except OSError as error:
        print(f"{error.filename or options.directory}: {error.strerror}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
