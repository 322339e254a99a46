"""The results of an evaluation as rows, a Markdown table and a plot."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from statistics import mean
from typing import Any

from models.evaluation.journal import CLEAN, Cell, Journal, Outcome
from models.evaluation.scores import Interval, difference, wilson

TITLES = {
    "transfer": "transfer: attack on undefended CLIP",
    "static": "static: attack on CLIP with the learned prompts",
    "adaptive": "adaptive: attack through the whole defense",
}


@dataclass(frozen=True, slots=True)
class Row:
    """A cell's results over the images.

    Attributes:
        right: for each image, the share of right answers: clean, or under the worst attack that
            the cell's attacker could have made.
        accuracy: of one answer to each image.
        asked: answers to each image.
        always: images whose answers are all right, under every attack.
        broken: images that each attack was the first to break: no answer is right.
        ms, attack_ms: mean time per image of the defense and of the attack.
        versus: paired differences of accuracy from other rows.
    """

    cell: Cell
    right: tuple[float, ...]
    accuracy: Interval
    asked: int
    always: Interval
    broken: Mapping[str, int]
    ms: float
    attack_ms: float
    versus: dict[str, Interval] = field(default_factory=dict)

    def describe(self) -> dict[str, Any]:
        """In JSON types; `pictures` has the number of right answers to each image, in the file's
        order."""
        return {
            **asdict(self.cell),
            "n": len(self.right),
            "right": round(sum(self.right), 4),
            "accuracy": self.accuracy.value,
            "interval": [self.accuracy.low, self.accuracy.high],
            "answers": self.asked,
            "all_right": {
                "value": self.always.value,
                "interval": [self.always.low, self.always.high],
            },
            "broken_first_by": dict(self.broken),
            "ms_a_picture": round(self.ms, 2),
            "attack_ms_a_picture": round(self.attack_ms, 2),
            "difference_from": {
                name: {"value": d.value, "interval": [d.low, d.high]}
                for name, d in self.versus.items()
            },
            "pictures": [round(share * self.asked) for share in self.right],
        }


def read_shares(row: Mapping[str, Any]) -> list[float]:
    """The share of right answers to each image, of a described row. In files from before a defense
    was asked several times, `pictures` is a string of 0 and 1."""
    return [int(right) / row.get("answers", 1) for right in row["pictures"]]


def tally(cells: Sequence[Cell], names: Sequence[str], journal: Journal) -> list[Row]:
    """One row per cell over the images of these names.

    Rows carry their differences from undefended CLIP under the attack on itself, and, under the
    same threat, from the plain mean over views and from the mean with prompts but without a step.
    """
    rows = {cell: _row(cell, names, journal) for cell in cells}
    for cell, row in rows.items():
        own = [Cell("plain", threat, cell.epsilon) for threat in ("transfer", "adaptive", CLEAN)]
        others = {
            "plain under its own attack": next((c for c in own if c in rows), None),
            "ensemble": Cell("ensemble", cell.threat, cell.epsilon),
            "apt-ensemble": Cell("apt-ensemble", cell.threat, cell.epsilon),
        }
        for name, other in others.items():
            if other in rows and other != cell:
                row.versus[name] = difference(row.right, rows[other].right)
    return list(rows.values())


def _row(cell: Cell, names: Sequence[str], journal: Journal) -> Row:
    right = tuple(journal.right(name, cell) for name in names)
    flat = [outcome for name in names for outcome in journal.seen(name, cell).values()]
    first = [next((o for o in journal.weighing(name, cell) if not o.right), None) for name in names]
    return Row(
        cell,
        right,
        wilson(sum(right), len(right)),
        max((outcome.asked for outcome in flat), default=1),
        wilson(right.count(1.0), len(right)),
        Counter(
            _label(o, cell) for o in first if o and (o.attack != CLEAN or cell.threat == CLEAN)
        ),
        mean(outcome.ms for outcome in flat) if flat else 0.0,
        sum(outcome.attack_ms for outcome in flat) / len(names),
    )


def _label(outcome: Outcome, cell: Cell) -> str:
    """An attack's name in a cell; it may come from another threat or a smaller epsilon."""
    if outcome.cell == cell:
        return outcome.attack
    return f"{outcome.attack} ({head(outcome.cell.threat, outcome.cell.epsilon)})"


def write_markdown(rows: Sequence[Row]) -> str:
    """One line per defense, one column per threat and epsilon, then the paired differences."""
    columns = list(dict.fromkeys((row.cell.threat, row.cell.epsilon) for row in rows))
    found = {row.cell: row for row in rows}
    asked, lines = max(row.asked for row in rows), []
    for defense in dict.fromkeys(row.cell.defense for row in rows):
        own = [found[Cell(defense, *column)] for column in columns]
        shown = [[percent(r.accuracy), *([percent(r.always)] if asked > 1 else [])] for r in own]
        lines.append((f"`{defense}`", *chain(*shown), f"{own[0].ms:.0f}"))
    named = [[head(*c), *([f"{head(*c)}, all {asked}"] if asked > 1 else [])] for c in columns]
    heads = ("defense", *chain(*named), "ms per image")
    parts = [
        f"Accuracy in % with 95% intervals on the same {len(rows[0].right)} images. Under attack, "
        "an image counts if it is right without an attack and under every attack. Epsilon is "
        "measured in the model's own input pixels.",
        tabulate(heads, lines),
    ]
    if asked > 1:
        parts[0] += (
            f" A random defense answers {asked} times with other draws: the first figure is the "
            f"accuracy of one answer, the second the share of images with all {asked} right."
        )
    if differences := [
        (f"`{r.cell.defense}`", head(r.cell.threat, r.cell.epsilon), name, _points(d))
        for r in rows
        for name, d in r.versus.items()
    ]:
        heads = ("defense", "under", "compared with", "points, paired 95% interval")
        parts += [
            "Differences on the same images. If an interval contains 0, the sign of the "
            "difference is not established.",
            tabulate(heads, differences),
        ]
    return "\n\n".join(parts) + "\n"


def tabulate(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def draw(rows: Sequence[Row], path: Path) -> None:
    """Accuracy over epsilon as SVG, a panel a threat model and a line a defense, with intervals;
    the same rows give the same file. Needs matplotlib, of the extra `train`."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "evaluation", "svg.fonttype": "none"})
    from matplotlib import pyplot

    threats = [t for t in dict.fromkeys(row.cell.threat for row in rows) if t != CLEAN]
    width = 4.5 * max(1, len(threats))
    figure, axes = pyplot.subplots(
        1, max(1, len(threats)), figsize=(width, 3.4), sharey=True, squeeze=False, layout="tight"
    )
    for panel, threat in zip(axes[0], threats or [CLEAN], strict=True):
        for defense in dict.fromkeys(row.cell.defense for row in rows):
            own = [r for r in rows if r.cell.defense == defense]
            line = sorted(
                (r for r in own if r.cell.threat in (CLEAN, threat)), key=lambda r: r.cell.epsilon
            )
            values = [100 * r.accuracy.value for r in line]
            spread = [
                [100 * max(0, r.accuracy.value - r.accuracy.low) for r in line],
                [100 * max(0, r.accuracy.high - r.accuracy.value) for r in line],
            ]
            at = [r.cell.epsilon for r in line]
            panel.errorbar(at, values, spread, marker=".", capsize=2, label=defense)
        panel.set(title=TITLES.get(threat, threat), xlabel="epsilon, 1/255 of a pixel's range")
        panel.title.set_fontsize(9)
        panel.set_ylim(bottom=0)
    axes[0][0].set_ylabel("accuracy, %")
    axes[0][-1].legend(frameon=False, fontsize=8)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def head(threat: str, epsilon: float) -> str:
    """A column's name."""
    return threat if threat == CLEAN else f"{threat} {epsilon:g}/255"


def percent(figure: Interval) -> str:
    """A proportion in percent with its interval."""
    return f"{100 * figure.value:.1f} ({100 * figure.low:.1f} to {100 * figure.high:.1f})"


def _points(figure: Interval) -> str:
    return f"{100 * figure.value:+.1f} ({100 * figure.low:+.1f} to {100 * figure.high:+.1f})"
