"""How well the suspicion score tells attacked pictures from clean ones, defense by defense."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from models.evaluation.journal import CLEAN, Cell, Journal
from models.evaluation.scores import Interval, auroc, threshold, wilson
from models.evaluation.table import head, percent, tabulate

RATES = (0.01, 0.05)


@dataclass(frozen=True, slots=True)
class Detection:
    """A cell's attacked pictures against all clean ones of the same defense.

    `found` holds for each of `RATES`, shares of clean pictures above the threshold, the share of
    attacked pictures above it. Attacked are the pictures that are right when clean.
    """

    cell: Cell
    attacked: int
    clean: int
    auroc: float
    found: tuple[Interval, ...]

    def describe(self) -> dict[str, Any]:
        """In JSON types."""
        return {
            "attacked": self.attacked,
            "clean": self.clean,
            "auroc": round(self.auroc, 4),
            "true_positive_rate_at": {
                f"{rate:g}": {"value": share.value, "interval": [share.low, share.high]}
                for rate, share in zip(RATES, self.found, strict=True)
            },
        }


def detect(cells: Sequence[Cell], names: Sequence[str], journal: Journal) -> list[Detection]:
    """Every attacked cell whose defense doubts at all: the plain forward alone cannot."""
    found = []
    for cell in cells:
        unhurt = Cell(cell.defense, CLEAN, 0)
        clean = [o.doubt for name in names for o in journal.seen(name, unhurt).values()]
        doubts = [o.doubt for name in names for o in journal.seen(name, cell).values()]
        if cell == unhurt or not doubts or not any(clean):
            continue
        above = (sum(doubt > threshold(clean, rate) for doubt in doubts) for rate in RATES)
        shares = tuple(wilson(hits, len(doubts)) for hits in above)
        found.append(Detection(cell, len(doubts), len(clean), auroc(doubts, clean), shares))
    return found


def write_detection(detections: Sequence[Detection]) -> str:
    """One line a cell, in Markdown."""
    heads = ("defense", "under", "AUROC", *(f"found at {rate:.0%} false, %" for rate in RATES), "n")
    lines = [
        (
            f"`{d.cell.defense}`",
            head(d.cell.threat, d.cell.epsilon),
            f"{d.auroc:.2f}",
            *(percent(share) for share in d.found),
            str(d.attacked),
        )
        for d in detections
    ]
    return (
        "Suspicion of attacked pictures against all clean ones of the same defense. A hint, never "
        "a guarantee.\n\n" + tabulate(heads, lines) + "\n"
    )
