"""Figures on pages: each command writes its own section, between a pair of comments."""

import argparse
import json
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
RELIABILITY = DOCS / "reliability.md"
INPUTS = ("--data", "--ordinary", "--attacks")


def write_section(name: str, text: str, page: Path = RELIABILITY) -> None:
    """Put `text` between `<!-- name -->` and `<!-- /name -->`. Raises ValueError without them."""
    before = page.read_text()
    pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
    after, found = pattern.subn(lambda match: f"{match[1]}{text.strip()}\n{match[2]}", before)
    if not found:
        raise ValueError(f"{page} has no section {name}")
    page.write_text(after)


def command_line(module: str, arguments: Sequence[str] | None = None) -> str:
    """The command as a page shows it: without `--dry` and without the folders of its input."""
    given = sys.argv[1:] if arguments is None else arguments
    parts = [
        Path(part).name if flag in INPUTS else part
        for flag, part in zip(["", *given], given, strict=False)
        if part != "--dry"
    ]
    return shlex.join(["python", "-m", module, *parts])


def publish(figures: dict[str, Any], page: str, out: Path, section: str | None, into: Path) -> None:
    """Write figures as JSON, the page beside them, the section if one is named, and print it."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(figures, indent=1, default=str) + "\n")
    out.with_suffix(".md").write_text(page)
    if section:
        write_section(section, page, into)
    print(page)


def make_parser(module: str, doc: str | None) -> argparse.ArgumentParser:
    """A parser whose help is the docstring of the command."""

    class Formatter(
        argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter
    ): ...

    return argparse.ArgumentParser(
        prog=f"python -m {module}", description=doc, formatter_class=Formatter
    )
