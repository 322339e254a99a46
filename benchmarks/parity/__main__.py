"""The command; `benchmarks.parity` says what it does."""

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks import parity
from benchmarks.parity import openclip, rtpt, tapt, ttc
from benchmarks.parity.figures import Difference, Figures, load_checkpoint, read
from models.clip import PromptedCLIP
from models.errors import LoadError

Compare = Callable[[Figures, PromptedCLIP], Iterator[Difference]]

METHODS: dict[str, Compare] = {
    "tapt": tapt.compare,
    "rtpt": rtpt.compare,
    "ttc": ttc.compare,
    "openclip": openclip.compare,
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.parity", description=parity.__doc__.partition("\n")[0]
    )
    parser.add_argument("--figures", type=Path, required=True, help="directory with the figures")
    directory: Path = parser.parse_args(argv).figures
    files = [(m, path) for m in METHODS for path in sorted(directory.glob(f"{m}_*.safetensors"))]
    if not files:
        wanted = ", ".join(f"{method}_*.safetensors" for method in METHODS)
        print(f"{directory} holds none of {wanted}", file=sys.stderr)
        return 2
    table = Table("file", "quantity", "largest difference", "tolerance", "")
    status = 0
    for method, path in files:
        try:
            clip = _load(method, path)
        except LoadError as error:
            print(f"{path.name}: {error}", file=sys.stderr)
            return 2
        for found in METHODS[method](read(path), clip):
            status |= found.beyond
            verdict = "[red]beyond[/red]" if found.beyond else "ok"
            if found.left_out:
                verdict += f", {found.left_out} undetermined"
            gap, tolerance = f"{found.gap:.2e}", f"{found.tolerance:.0e}"
            table.add_row(path.stem, found.quantity, gap, tolerance, verdict)
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    return int(status)


def _load(method: str, path: Path) -> PromptedCLIP:
    """The checkpoint beside a file of figures.

    Raises:
        LoadError: there is none.
    """
    if method == "openclip":
        return openclip.load(path.with_suffix(""))
    checkpoints = sorted(found for found in path.parent.glob("clip_*") if found.is_dir())
    if not checkpoints:
        raise LoadError(f"{path.parent} holds no clip_* directory")
    named = [found for found in checkpoints if f"_{found.name[5:]}_" in f"{path.stem}_"]
    # Several names may match: "small" is part of "small_gelu".
    return load_checkpoint(
        max(named, key=lambda found: len(found.name)) if named else checkpoints[0]
    )


if __name__ == "__main__":
    sys.exit(main())
