"""The recipe `strong`: attacks that differ in loss, starting point and way through the adaptation.

An image is robust only if it withstands all of them. They run in this order, and what is broken is
not attacked again: cheap ones first.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from models.attacks.adaptive import Way
from models.attacks.ascent import Ascent, off_clean_feature, towards_likeliest, untargeted
from models.attacks.attack import Attack, cross_entropy, margin

STRONG_STEPS, STRONG_ANSWERS = 60, 10  # by default, with this recipe


@dataclass(frozen=True, slots=True)
class Part:
    """An attack of the recipe.

    Attributes:
        way: its way through the adaptation of a defense that adapts prompts.
        alone: whether it also attacks models of a single view, where losses on mean logits and on
            the mean prediction are the same.
    """

    attack: Attack
    way: Way
    alone: bool = False


STRONG: Mapping[str, Part] = {
    "logits-margin": Part(Ascent(untargeted(margin)), "stepless"),
    "logits-entropy": Part(
        Ascent(untargeted(cross_entropy), start="transfer"), "stepless", alone=True
    ),
    "prediction-margin": Part(Ascent(untargeted(margin), of_logits=False, start="static"), "bpda"),
    "feature": Part(Ascent(off_clean_feature), "stepless"),
    "dlr": Part(Ascent(towards_likeliest), "stepless", alone=True),
    "prediction-entropy": Part(
        Ascent(untargeted(cross_entropy), of_logits=False, start="stepless"), "unrolled"
    ),
}


def ways_of(attack: str, ways: Sequence[str]) -> list[str]:
    """Of a defense's ways through its adaptation, those that an attack takes: of several, a part of
    the recipe takes its own, other attacks all that give the defense's own gradient."""
    if len(ways) == 1:
        return list(ways)
    if attack in STRONG:
        return [STRONG[attack].way]
    return [way for way in ways if way != "stepless"]
