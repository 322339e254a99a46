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
    """A cell's attacked images against all clean ones of the same defense, by the suspicion of one
    answer to each, which is what a client sees.

    Attributes:
        attacked: number of images that the cell's own attacks were made on: those that are right
            when clean and that no weaker attacker broke. Each counts once, under the attack that
            hurt it most, or the last one if none did.
        clean: number of clean images, including those that are answered wrongly, as in traffic.
        found: for each of `RATES` (shares of clean images above the threshold), the share of
            attacked images above it. The intervals leave out that the threshold, too, is estimated
            from these clean images.
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
            "answers": 1,  # files without it may have the mean over several answers
            "auroc": round(self.auroc, 4),
            "true_positive_rate_at": {
                f"{rate:g}": {"value": share.value, "interval": [share.low, share.high]}
                for rate, share in zip(RATES, self.found, strict=True)
            },
        }


def detect(cells: Sequence[Cell], names: Sequence[str], journal: Journal) -> list[Detection]:
    """Every attacked cell whose defense has a score; `plain` has none. Cells of which the journal
    does not have the score of one answer are left out."""
    found = []
    for cell in cells:
        unhurt = Cell(cell.defense, CLEAN, 0)
        clean = _scores([o for name in names for o in journal.seen(name, unhurt).values()])
        attacked = _scores([o for name in names if (o := _decisive(journal, name, cell))])
        if cell == unhurt or not attacked or not any(clean):
            continue
        above = (sum(score > threshold(clean, rate) for score in attacked) for rate in RATES)
        shares = tuple(wilson(hits, len(attacked)) for hits in above)
        found.append(Detection(cell, len(attacked), len(clean), auroc(attacked, clean), shares))
    return found


def _scores(outcomes: Sequence[Outcome]) -> list[float]:
    """The suspicion of each outcome; none if one is unknown."""
    known = [o.suspicion for o in outcomes if o.suspicion is not None]
    return known if len(known) == len(outcomes) else []


def _decisive(journal: Journal, name: str, cell: Cell) -> Outcome | None:
    """The cell's own attack that hurt an image most, or the last one if none did; None if there was
    none. A weaker attacker's may have decided on the image, but do not show what this one hides."""
    tried = list(journal.seen(name, cell).values())
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
        "Suspicion of one answer to each attacked image, against one answer to each clean image of "
        "the same defense. n: images that the attacks of this row were made on. The intervals "
        "leave out the uncertainty of the threshold. A hint, not a guarantee.\n\n"
        + tabulate(heads, lines)
        + "\n"
    )
