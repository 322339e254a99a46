"""How well the suspicion score tells attacked pictures from clean ones, defense by defense."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from models.evaluation.journal import CLEAN, Cell, Journal, Outcome
from models.evaluation.scores import Interval, auroc, threshold, wilson
from models.evaluation.table import head, percent, tabulate

RATES = (0.01, 0.05)


@dataclass(frozen=True, slots=True)
class Detection:
    """A cell's attacked pictures against all clean ones of the same defense.

    `found` holds for each of `RATES`, shares of clean pictures above the threshold, the share of
    attacked pictures above it. Attacked are the pictures that are right when clean; each counts
    once, under the attack that broke it or else the last one. The clean ones are all, as in
    traffic, also those that are answered wrongly and doubted more.
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
        doubts = [o.doubt for name in names if (o := _decisive(journal, name, cell))]
        if cell == unhurt or not doubts or not any(clean):
            continue
        above = (sum(doubt > threshold(clean, rate) for doubt in doubts) for rate in RATES)
        shares = tuple(wilson(hits, len(doubts)) for hits in above)
        found.append(Detection(cell, len(doubts), len(clean), auroc(doubts, clean), shares))
    return found


def _decisive(journal: Journal, name: str, cell: Cell) -> Outcome | None:
    """The attack that broke a picture, else the last that tried; None where none did."""
    tried = [o for o in journal.weighing(name, cell) if o.cell.threat != CLEAN]
    return next((o for o in tried if not o.right), tried[-1] if tried else None)


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
