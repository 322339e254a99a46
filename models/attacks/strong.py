"""The recipe `strong`: attacks that differ in loss, starting point and way through the adaptation.

An image is robust only if it withstands all of them. They run in this order, and what is broken is
not attacked again: cheap ones first.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from models.attacks.adaptive import Way
from models.attacks.ascent import Ascent, off_clean_feature, towards_likeliest, untargeted
from models.attacks.attack import Attack, cross_entropy, margin
from models.attacks.threats import STEALTHY

STEPS, ANSWERS = 40, 10  # by default, with this recipe
QUERIES, QUERIED = 200, 40  # queries of Square and RayS, and images that these attack


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
    "quick": Part(
        Ascent(untargeted(margin), of_logits=False, start="static", share=1 / 4), "stepless"
    ),
    "prediction-margin": Part(
        Ascent(untargeted(margin), of_logits=False, start="static"), "stepless"
    ),
    "logits-entropy": Part(
        Ascent(untargeted(cross_entropy), start="transfer"), "stepless", alone=True
    ),
    "logits-margin": Part(Ascent(untargeted(margin)), "bpda"),
    "feature": Part(Ascent(off_clean_feature, share=1 / 2), "stepless"),
    "dlr": Part(Ascent(towards_likeliest, share=1 / 4), "stepless", alone=True),
    "prediction-entropy": Part(
        Ascent(untargeted(cross_entropy), of_logits=False, start="stepless", share=1 / 2),
        "unrolled",
    ),
}
COST = "274 forward and backward passes over all views and 368 forward passes"
"""For an image that withstands all gradient attacks, with the default steps; a test counts them."""

RECIPE = (*STRONG, "square", "rays")
"""The names of its attacks, in order."""


def ways_of(attack: str, ways: Sequence[str]) -> list[str]:
    """Of a defense's ways through its adaptation, those that an attack takes: of several, a part of
    the recipe takes its own, other attacks all that give the defense's own gradient."""
    if len(ways) == 1:
        return list(ways)
    if attack in STRONG:
        return [STRONG[attack].way]
    if attack == STEALTHY:
        return ["stepless"]
    return [way for way in ways if way != "stepless"]
