"""How well the suspicion score separates attacked from clean images, per defense."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from models.evaluation.journal import CLEAN, Cell, Journal, Outcome
from models.evaluation.scores import Interval, auroc, threshold, wilson
from models.evaluation.table import head, percent, tabulate

RATES = (0.01, 0.05)


@dataclass(frozen=True, slots=True)
class Detection:
    """A cell's attacked images against all clean ones of the same defense.

    Attributes:
        attacked: number of images that are right when clean. Each counts once, under the attack
            that hurt it most, or the last one if none did.
        clean: number of clean images, including those that are answered wrongly, as in traffic.
        found: for each of `RATES` (shares of clean images above the threshold), the share of
            attacked images above it.
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
    """Every attacked cell whose defense has a score; `plain` has none."""
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
    """The attack that hurt an image most, or the last one if none did; None if there was none."""
    tried = [o for o in journal.weighing(name, cell) if o.cell.threat != CLEAN]
    worst = min(tried, key=lambda outcome: outcome.share, default=None)
    return tried[-1] if worst is not None and worst.share == 1 else worst


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
        "Suspicion of attacked images against all clean ones of the same defense. A hint, not a "
        "guarantee.\n\n" + tabulate(heads, lines) + "\n"
    )
