"""The command; `benchmarks.parity` says what it does."""

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks import parity
from benchmarks.parity import rtpt, tapt, ttc
from benchmarks.parity.figures import Difference, Figures, load_checkpoint, read
from models.clip import PromptedCLIP

METHODS: dict[str, Callable[[Figures, PromptedCLIP], Iterator[Difference]]] = {
    "tapt": tapt.compare,
    "rtpt": rtpt.compare,
    "ttc": ttc.compare,
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.parity", description=parity.__doc__.partition("\n")[0]
    )
    parser.add_argument("--figures", type=Path, required=True, help="directory with the figures")
    directory: Path = parser.parse_args(argv).figures
    files = [(m, path) for m in METHODS for path in sorted(directory.glob(f"{m}_*.safetensors"))]
    checkpoints = sorted(path for path in directory.glob("clip_*") if path.is_dir())
    if not files or not checkpoints:
        wanted = ", ".join(f"{method}_*.safetensors" for method in METHODS)
        print(f"{directory} holds none of {wanted} beside a clip_* directory", file=sys.stderr)
        return 2
    clips = {path.name.removeprefix("clip_"): load_checkpoint(path) for path in checkpoints}
    table = Table("file", "quantity", "largest difference", "tolerance", "")
    status = 0
    for method, path in files:
        for found in METHODS[method](read(path), _checkpoint_of(path, clips)):
            status |= found.beyond
            verdict = "[red]beyond[/red]" if found.beyond else "ok"
            if found.left_out:
                verdict += f", {found.left_out} undetermined"
            gap, tolerance = f"{found.gap:.2e}", f"{found.tolerance:.0e}"
            table.add_row(path.stem, found.quantity, gap, tolerance, verdict)
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    return int(status)


def _checkpoint_of(path: Path, clips: dict[str, PromptedCLIP]) -> PromptedCLIP:
    """The checkpoint that a file's name speaks of, or the only one."""
    named = [name for name in clips if f"_{name}_" in f"{path.stem}_"]
    return clips[max(named, key=len)] if named else next(iter(clips.values()))


if __name__ == "__main__":
    sys.exit(main())
