"""Merge the shards of an evaluation, which ran on several machines, into one.

    tapt-serve evaluate ... --shard 0/2 --json shards/0.json
    tapt-serve evaluate ... --shard 1/2 --json shards/1.json
    tapt-serve evaluate --merge shards --json OUT.json

The files are those of one run on all images, except for times and machine. OUT.jsonl holds all
outcomes, so that the command without `--shard` may add more to it.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from models.errors import LoadError
from models.evaluation.journal import Cell, Journal
from models.evaluation.report import report

SAME = {
    "key": "settings",
    "data": "data",
    "limit": "--limit",
    "attacks": "attacks",
    "queried": "--queried",
    "checked": "--check",
    "preflight": "--preflight",
}
"""What all shards must share, and what a refusal calls it."""

TAKEN = ("command", "machine", "warned")
"""What else is read of a shard's file."""


def merge(sources: Sequence[Path], out: Path) -> None:
    """Write the files of a whole evaluation from those of its shards.

    Args:
        sources: JSON files of shards, or directories that hold them.

    Raises:
        LoadError: there is no shard, one is damaged, missing or there twice, or they were not made
            with the same settings on the same images.
    """
    files = _find(sources)
    if out in files:
        raise LoadError(f"{out} is one of the shards: write to another file with --json")
    shards = {file: _read(file) for file in files}
    _check(shards)
    first, *_ = ordered = sorted(shards.values(), key=lambda facts: facts["shard"]["index"])
    pictures: list[str] = [""] * sum(len(facts["pictures"]) for facts in ordered)
    for index, facts in enumerate(ordered):
        pictures[index :: len(ordered)] = facts["pictures"]
    journal = Journal(_gather_outcomes(files, out), first["key"])
    warnings = [sentence for facts in ordered for sentence in facts["warned"]]
    machines = [facts["machine"] for facts in ordered]
    if any(machine != machines[0] for machine in machines):
        warnings.append("The shards ran on different machines: times are means over these.")
    facts = {
        **first,
        "data": {**first["data"], "n": len(pictures)},
        "command": re.sub(r"--shard[ =]\S+", f"--shard I/{len(ordered)}", first["command"])
        + " for each I, then tapt-serve evaluate --merge DIR --json OUT",
        "shard": {"index": 0, "of": 1},
        "merged": len(ordered),
        "warned": warnings,
        "pictures": pictures,
    }
    report(out, facts, _cells(first), journal, warnings)


def _find(sources: Sequence[Path]) -> list[Path]:
    """The JSON files that are named or lie in directories that are."""
    files: list[Path] = []
    for source in sources:
        if source.is_dir():
            files += sorted(source.rglob("*.json"))
        elif source.is_file():
            files.append(source)
        else:
            raise LoadError(f"there are no shards at {source}")
    if not files:
        raise LoadError(f"there are no shards in {', '.join(map(str, sources))}")
    return files


def _read(file: Path) -> dict[str, Any]:
    try:
        facts = json.loads(file.read_text(encoding="utf-8"))
        shard = facts["shard"]
        whole = 0 <= shard["index"] < shard["of"] and all(name in facts for name in (*SAME, *TAKEN))
        if not whole or not facts["pictures"] or not facts["rows"]:
            raise ValueError("something is missing in it")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LoadError(f"{file} is not the file of a shard: {error}") from error
    known: dict[str, Any] = facts
    return known


def _check(shards: dict[Path, dict[str, Any]]) -> None:
    """Raises LoadError unless these are all the shards of one evaluation."""
    (one, first), *others = shards.items()
    for file, facts in others:
        for name, title in SAME.items():
            mine, theirs = facts[name], first[name]
            if name == "data":  # shards differ in size
                mine, theirs = ({**each, "n": None} for each in (mine, theirs))
            if mine != theirs:
                raise LoadError(f"{file} and {one} were made with different {title}")
        if _cells(facts) != _cells(first):
            raise LoadError(f"{file} and {one} measure different rows")
        if facts["shard"]["of"] != first["shard"]["of"]:
            raise LoadError(f"{file} and {one} are of different numbers of shards")
    by_index: dict[int, Path] = {}
    for file, facts in shards.items():
        index = facts["shard"]["index"]
        if index in by_index:
            raise LoadError(f"{by_index[index]} and {file} are both shard {index}")
        by_index[index] = file
    of = first["shard"]["of"]
    if missing := [str(index) for index in range(of) if index not in by_index]:
        raise LoadError(f"of {of} shards, these are missing: {', '.join(missing)}")


def _cells(facts: dict[str, Any]) -> list[Cell]:
    return [Cell(row["defense"], row["threat"], row["epsilon"]) for row in facts["rows"]]


def _gather_outcomes(files: Sequence[Path], out: Path) -> Path:
    """One journal of all shards, beside `out`.

    Raises LoadError if a shard has none."""
    journal, scratch = out.with_suffix(".jsonl"), out.with_suffix(".jsonl.tmp")
    out.parent.mkdir(parents=True, exist_ok=True)
    with scratch.open("w", encoding="utf-8") as whole:
        for file in files:
            try:
                text = file.with_suffix(".jsonl").read_text(encoding="utf-8")
            except OSError as error:
                scratch.unlink()
                raise LoadError(f"{file} has no outcomes beside it: {error}") from error
            whole.write(text[: text.rfind("\n") + 1])
    scratch.replace(journal)
    return journal
