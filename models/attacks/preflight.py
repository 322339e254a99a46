"""Checks for masked gradients, which make attacks look weak without a model being robust.

Each warning is a sentence that says what was seen and what to do.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from models.attacks.attack import Budget, Model, cross_entropy, loss_and_gradient, loss_only
from models.attacks.pgd import pgd
from models.attacks.square import square

LARGE = 0.5  # an epsilon at which no model should stay right


def preflight(
    model: Model, pixels: Tensor, labels: Tensor, budget: Budget, seeds: Sequence[int]
) -> list[str]:
    """Warnings on attacking a model at some pixels [N, 3, S, S], one sentence each.

    A handful of images shows gross faults; partial ones take many.
    """
    at = loss_and_gradient(model, pixels, labels, cross_entropy, budget.draws)
    with torch.no_grad():
        random = not torch.equal(model(pixels), model(pixels))
    warnings = []
    if random and budget.draws == 1:
        warnings.append("The model is random: average gradients over draws with --eot.")
    if flat := int((at.gradient.flatten(1).abs().amax(dim=1) == 0).sum()):
        warnings.append(f"The gradient is zero on {flat} of {len(pixels)} images: it is masked.")

    def standing(attacked: Tensor) -> Tensor:
        return ~loss_only(model, attacked, labels, cross_entropy, budget.draws).wrong

    right = standing(pixels)
    by_pgd = right & standing(pgd(model, pixels, labels, budget, seeds))
    by_square = right & standing(square(model, pixels, labels, budget, seeds))
    if by_square.sum() < by_pgd.sum():
        warnings.append(
            f"Square leaves {int(by_square.sum())} of {int(right.sum())} images right where PGD "
            f"leaves {int(by_pgd.sum())}: gradients are masked, and a figure from gradient attacks "
            "alone would flatter."
        )
    large = pgd(model, pixels, labels, replace(budget, epsilon=LARGE), seeds)
    if left := int((right & standing(large)).sum()):
        warnings.append(
            f"PGD at an epsilon of {LARGE:g} leaves {left} of {len(pixels)} images right: "
            "the attack does not work on this model, or needs more steps."
        )
    return warnings
