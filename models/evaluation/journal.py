"""Outcomes of an evaluation, one JSON line per image as they come, so that a kill loses none."""

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

CLEAN = "clean"
DOUBLED, LARGE = "doubled", "large"
CHECKS = (DOUBLED, LARGE)  # cells that check an attack and count in no other


@dataclass(frozen=True, slots=True, order=True)
class Cell:
    """What a row of the table measures; `epsilon` is in levels of 1/255, 0 for `clean`."""

    defense: str
    threat: str
    epsilon: float


@dataclass(frozen=True, slots=True)
class Outcome:
    """A defense's answers to one image under one attack.

    Attributes:
        right: how many of the answers were right, of `asked`. A random defense draws anew for each.
        suspicion: of the first answer, in [0, 1]; None in journals that have only the mean over
            several answers.
        ms, attack_ms: the defense's time per answer and the attack's per image.
    """

    picture: str
    cell: Cell
    attack: str
    right: int
    suspicion: float | None
    ms: float
    attack_ms: float
    asked: int = 1

    @property
    def share(self) -> float:
        """How likely one answer is right."""
        return self.right / self.asked


class Journal:
    """The outcomes under one key; lines of other keys are kept but ignored."""

    def __init__(self, path: Path, key: str) -> None:
        self._path, self._key = path, key
        self._known: dict[tuple[str, Cell], dict[str, Outcome]] = {}
        self._cells: set[Cell] = set()
        if path.exists():
            self._read()

    def __len__(self) -> int:
        return sum(map(len, self._known.values()))

    def add(self, outcomes: Iterable[Outcome]) -> None:
        """Record outcomes, on disk first."""
        outcomes = list(outcomes)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as file:
            for outcome in outcomes:
                file.write(json.dumps({"key": self._key, **asdict(outcome)}) + "\n")
            file.flush()
            os.fsync(file.fileno())
        for outcome in outcomes:
            self._keep(outcome)

    def seen(self, picture: str, cell: Cell) -> dict[str, Outcome]:
        """An image's outcomes in a cell, by attack."""
        return self._known.get((picture, cell), {})

    def right(self, picture: str, cell: Cell) -> float:
        """How likely one answer to an image is right: clean, or under the worst attack tried that
        the cell's attacker could have made."""
        return min((outcome.share for outcome in self.weighing(picture, cell)), default=1.0)

    def weighing(self, picture: str, cell: Cell) -> list[Outcome]:
        """The outcomes that decide on an image in a cell, the cell's own last.

        An attacker may use a smaller epsilon, and one who knows the whole defense may attack like
        one who does not. `static` stays as published: the attack on the learned prompts alone.
        """
        cells = [
            other
            for other in self._cells
            if other.defense == cell.defense
            and other.epsilon <= cell.epsilon
            and (other.threat in (CLEAN, cell.threat) or cell.threat == "adaptive")
            and (other.threat not in CHECKS or other == cell)
        ]
        cells.sort(key=lambda other: (other == cell, other.threat == cell.threat, other))
        return [outcome for other in cells for outcome in self.seen(picture, other).values()]

    def _keep(self, outcome: Outcome) -> None:
        self._cells.add(outcome.cell)
        self._known.setdefault((outcome.picture, outcome.cell), {})[outcome.attack] = outcome

    def _read(self) -> None:
        data = self._path.read_bytes()
        if data and not data.endswith(b"\n"):  # the last line is incomplete
            data = data[: data.rfind(b"\n") + 1]
            with self._path.open("r+b") as file:
                file.truncate(len(data))
        for line in data.decode("utf-8").splitlines():
            values = json.loads(line)
            if values.pop("key") == self._key:
                self._keep(_read_outcome(values))


def _read_outcome(values: dict[str, Any]) -> Outcome:
    """The outcome of a line. Older lines have `doubt`, the mean suspicion of all answers."""
    if "doubt" in values:
        mean = values.pop("doubt")
        values["suspicion"] = mean if values.get("asked", 1) == 1 else None
    return Outcome(**{**values, "cell": Cell(**values["cell"])})
