"""Outcomes of an evaluation as they come in: one JSON line a picture, so that a kill loses none."""

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

CLEAN = "clean"


@dataclass(frozen=True, slots=True, order=True)
class Cell:
    """What a row of the table is about; `epsilon` is in levels of 1/255, 0 for `clean`."""

    defense: str
    threat: str
    epsilon: float


@dataclass(frozen=True, slots=True)
class Outcome:
    """Whether a defense's answer to one picture, attacked in one way, was right.

    `doubt` is the defense's suspicion in [0, 1]; `ms` its own time a picture, `attack_ms` the
    attack's.
    """

    picture: str
    cell: Cell
    attack: str
    right: bool
    doubt: float
    ms: float
    attack_ms: float


class Journal:
    """The outcomes under one key; lines of other keys are left where they are."""

    def __init__(self, path: Path, key: str) -> None:
        self._path, self._key = path, key
        self._known: dict[tuple[str, Cell], dict[str, Outcome]] = {}
        self._cells: set[Cell] = set()
        if path.exists():
            self._read()

    def __len__(self) -> int:
        return sum(map(len, self._known.values()))

    def add(self, outcomes: Iterable[Outcome]) -> None:
        """Keep outcomes and write them down before anything else is done."""
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
        """A picture's outcomes in a cell, by attack."""
        return self._known.get((picture, cell), {})

    def right(self, picture: str, cell: Cell) -> bool:
        """Whether a picture counts: right clean, and right under every attack tried that the
        cell's attacker could have made."""
        return all(outcome.right for outcome in self.weighing(picture, cell))

    def weighing(self, picture: str, cell: Cell) -> list[Outcome]:
        """What decides on a picture in a cell, its own outcomes last.

        A ball holds the smaller ones, and who knows the whole defense can attack as one who does
        not. `static` is kept as it is published: the attack on the learned prompts alone.
        """
        cells = [
            other
            for other in self._cells
            if other.defense == cell.defense
            and other.epsilon <= cell.epsilon
            and (other.threat in (CLEAN, cell.threat) or cell.threat == "adaptive")
        ]
        cells.sort(key=lambda other: (other == cell, other.threat == cell.threat, other))
        return [outcome for other in cells for outcome in self.seen(picture, other).values()]

    def _keep(self, outcome: Outcome) -> None:
        self._cells.add(outcome.cell)
        self._known.setdefault((outcome.picture, outcome.cell), {})[outcome.attack] = outcome

    def _read(self) -> None:
        data = self._path.read_bytes()
        if data and not data.endswith(b"\n"):  # cut in the middle of a line
            data = data[: data.rfind(b"\n") + 1]
            with self._path.open("r+b") as file:
                file.truncate(len(data))
        for line in data.decode("utf-8").splitlines():
            values = json.loads(line)
            if values.pop("key") == self._key:
                self._keep(Outcome(**{**values, "cell": Cell(**values["cell"])}))
