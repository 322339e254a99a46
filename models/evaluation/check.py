"""Checks of the adaptive attack after an evaluation: a weak attack makes defenses look good.

More steps should break hardly any more images, and a large epsilon should leave none. The outcomes
are in the journal but count in no row.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from models.classifier import DefendedClassifier
from models.evaluation.journal import DOUBLED, LARGE, Cell, Journal
from models.evaluation.trial import Protocol, Subject, Trial

MORE = 0.02  # share of the images that twice the steps may break beyond the evaluation
LARGE_EPSILON = 128.0  # levels at which no image should stay right


@dataclass(frozen=True, slots=True)
class Check:
    """What twice the steps and a large epsilon did to a defense.

    Attributes:
        attack: the attack that was repeated.
        more: the share of images that twice the steps break beyond all attacks of the evaluation;
            also what one more restart would.
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
            "broken_more_by_twice_the_steps": round(self.more, 4),
            "left_right_at_a_large_epsilon": round(self.left, 4),
            "passed": not self.warnings(),
        }

    def warnings(self) -> list[str]:
        """A sentence for each check that failed."""
        found = []
        if self.more >= MORE:
            found.append(
                f"{self.defense}: twice the steps of {self.attack} break {100 * self.more:.1f} "
                "points more, so the attack has not converged; try more --attack-steps."
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
) -> list[Check]:
    """Check the adaptive attack on each defense at the largest epsilon; none without that threat.

    The attack that is repeated is the recipe's `prediction-margin`, or else the first.
    """
    if "adaptive" not in protocol.threats:
        return []
    attack = "prediction-margin" if "prediction-margin" in protocol.attacks else protocol.attacks[0]
    budget, epsilon = protocol.budget, max(protocol.epsilons)
    twice = replace(protocol, budget=replace(budget, steps=2 * budget.steps))
    checks = []
    for defense in protocol.defenses:
        own, doubled = Cell(defense, "adaptive", epsilon), Cell(defense, DOUBLED, epsilon)
        large = Cell(defense, LARGE, LARGE_EPSILON)
        standing = [subject for subject in subjects if journal.right(subject.name, own) > 0]
        for cell, spent, some in ((doubled, twice, standing), (large, protocol, subjects)):
            Trial(classifier, names, spent, journal, lambda n: None).attack(some, cell, attack)
        lost = [
            max(0.0, journal.right(s.name, own) - journal.right(s.name, doubled)) for s in standing
        ]
        left = [journal.right(subject.name, large) for subject in subjects]
        count = len(subjects)
        checks.append(Check(defense, attack, epsilon, sum(lost) / count, sum(left) / count))
    return checks
