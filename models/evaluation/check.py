"""Checks of the adaptive attack after an evaluation: a weak attack makes defenses look good.

More steps or queries should break hardly any more images, and a large epsilon should leave none.
The outcomes are in the journal but count in no row.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from models.classifier import DefendedClassifier
from models.evaluation.journal import DOUBLED, LARGE, Cell, Journal
from models.evaluation.sample import Subject
from models.evaluation.trial import BY_QUERIES, Protocol, Trial

MORE = 0.02  # share of the images that twice the budget may break beyond the evaluation
LARGE_EPSILON = 128.0  # levels at which no image should stay right


@dataclass(frozen=True, slots=True)
class Check:
    """What twice the budget and a large epsilon did to a defense.

    Attributes:
        attack: the attack that was repeated.
        more: the share of images that twice the steps, or queries, break beyond all attacks of the
            evaluation; also what one more restart would.
        left: the share of images that stay right at the large epsilon.
    """

    defense: str
    attack: str
    epsilon: float
    more: float
    left: float

    def describe(self) -> dict[str, Any]:
        """In JSON types."""
        return {
            "defense": self.defense,
            "attack": self.attack,
            "epsilon": self.epsilon,
            "broken_more_by_twice_the_budget": round(self.more, 4),
            "left_right_at_a_large_epsilon": round(self.left, 4),
            "passed": not self.warnings(),
        }

    def warnings(self) -> list[str]:
        """A sentence for each check that failed."""
        found = []
        if self.more >= MORE:
            spent, flag = "steps", "--attack-steps"
            if self.attack in BY_QUERIES:
                spent, flag = "queries", "--queries"
            found.append(
                f"{self.defense}: twice the {spent} of {self.attack} break {100 * self.more:.1f} "
                f"points more, so the attack has not converged; try more {flag}."
            )
        if self.left > 0:
            found.append(
                f"{self.defense}: {self.attack} leaves {100 * self.left:.1f}% of the images right "
                f"at an epsilon of {LARGE_EPSILON:g}/255: the attack does not work on this defense."
            )
        return found


def cross_check(
    classifier: DefendedClassifier,
    names: Sequence[str],
    protocol: Protocol,
    subjects: Sequence[Subject],
    journal: Journal,
) -> None:
    """Check the adaptive attack on each defense at the largest epsilon, if there is that threat.

    The attack that is repeated is the recipe's `prediction-margin`, or else the first that follows
    gradients, or else the first.
    """
    attack, budget = _repeated(protocol.attacks), protocol.budget
    limit = "queries" if attack in BY_QUERIES else "steps"
    twice = replace(protocol, budget=replace(budget, **{limit: 2 * getattr(budget, limit)}))
    for own in _checked(protocol.cells):
        doubled, large = _cells(own)
        standing = [subject for subject in subjects if journal.right(subject.name, own) > 0]
        for cell, spent, some in ((doubled, twice, standing), (large, protocol, subjects)):
            Trial(classifier, names, spent, journal, lambda n: None).attack(some, cell, attack)


def read_checks(
    attacks: Sequence[str], cells: Sequence[Cell], pictures: Sequence[str], journal: Journal
) -> list[Check]:
    """What `cross_check` found, for the rows `cells` of an evaluation with these attacks."""
    checks = []
    for own in _checked(cells):
        doubled, large = _cells(own)
        lost = [
            max(0.0, before - journal.right(picture, doubled))
            for picture in pictures
            if (before := journal.right(picture, own)) > 0
        ]
        left = [journal.right(picture, large) for picture in pictures]
        count = len(pictures)
        more = sum(lost) / count
        attack = _repeated(attacks)
        checks.append(Check(own.defense, attack, own.epsilon, more, sum(left) / count))
    return checks


def _repeated(attacks: Sequence[str]) -> str:
    if "prediction-margin" in attacks:
        return "prediction-margin"
    return next((name for name in attacks if name not in BY_QUERIES), attacks[0])


def _checked(cells: Sequence[Cell]) -> list[Cell]:
    adaptive = [cell for cell in cells if cell.threat == "adaptive"]
    largest = max((cell.epsilon for cell in adaptive), default=0.0)
    return [cell for cell in adaptive if cell.epsilon == largest]


def _cells(own: Cell) -> tuple[Cell, Cell]:
    """Where the outcomes of twice the steps and of the large epsilon are kept."""
    return replace(own, threat=DOUBLED), Cell(own.defense, LARGE, LARGE_EPSILON)
