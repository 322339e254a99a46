"""The files of an evaluation: JSON with everything, a page of tables, a plot."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from models.errors import install_extra
from models.evaluation.check import read_checks
from models.evaluation.detection import Detection, detect, write_detection
from models.evaluation.journal import Cell, Journal
from models.evaluation.table import Row, draw, tally, write_markdown
from models.evaluation.trial import suspect


def report(
    out: Path,
    facts: dict[str, Any],
    cells: Sequence[Cell],
    journal: Journal,
    warnings: Sequence[str],
) -> None:
    """Write the files of the images `facts["pictures"]`, with the rows `cells`, and print the page.

    Args:
        facts: what the JSON file says besides rows, checks and warnings.
        warnings: what was warned of before.
    """
    attacks, pictures = facts["attacks"], facts["pictures"]
    checks = read_checks(attacks, cells, pictures, journal) if facts["checked"] else []
    warnings = [
        *warnings,
        *suspect(cells, pictures, journal),
        *(sentence for check in checks for sentence in check.warnings()),
    ]
    found = {"checks": [check.describe() for check in checks], "warnings": warnings}
    rows, detections = tally(cells, pictures, journal), detect(cells, pictures, journal)
    _write(out, {**facts, **found}, rows, detections, warnings)


def _write(
    out: Path,
    facts: dict[str, Any],
    rows: Sequence[Row],
    detections: Sequence[Detection],
    warnings: Sequence[str],
) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    told = {found.cell: {"suspicion": found.describe()} for found in detections}
    facts = {**facts, "rows": [row.describe() | told.get(row.cell, {}) for row in rows]}
    page = write_markdown(rows)
    if detections:
        page += "\n" + write_detection(detections)
    page += "".join(f"\nWarning: {sentence}\n" for sentence in warnings)
    out.with_suffix(".md").write_text(page, encoding="utf-8")
    print(page)
    try:
        draw(rows, out.with_suffix(".svg"))
    except ImportError:
        print(f"no plot: it needs matplotlib; {install_extra('train')}", file=sys.stderr)
    # Last: a shard whose JSON file exists is complete.
    scratch = out.with_suffix(".json.tmp")
    scratch.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    scratch.replace(out)
