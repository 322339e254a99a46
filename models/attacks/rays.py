"""RayS (Chen and Gu, KDD 2020): a search that sees decisions alone, no scores and no gradients.

It looks for the direction, of signs, in which the decision boundary is nearest, and flips the signs
of ever smaller blocks of pixels. Masked gradients or saturated scores do not affect it.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from models.attacks.attack import LEVELS, Budget, Model, fix_draws, select, strongest

PRECISION = 0.5 / LEVELS  # of the distance to the boundary


def rays(
    model: Model, pixels: Tensor, labels: Tensor, budget: Budget, seeds: Sequence[int]
) -> Tensor:
    """Search one image at a time; see `Attack`. Nothing in it is random but the model."""
    steps = [
        search(select(model, [row]), pixels[row : row + 1], labels[row], budget)
        for row in range(len(pixels))
    ]
    radii = torch.tensor([min(radius, budget.epsilon) for _, radius in steps]).to(pixels)
    directions = torch.cat([direction for direction, _ in steps])
    edge, whole = radii.view(-1, 1, 1, 1) * directions, budget.epsilon * directions
    candidates = [(pixels + shift).clamp(0, 1) for shift in (edge, whole)]
    return strongest(model, pixels, labels, budget, candidates)


@torch.no_grad()
def search(model: Model, pixels: Tensor, label: Tensor, budget: Budget) -> tuple[Tensor, float]:
    """The direction [1, 3, S, S] of signs with the nearest boundary, and its distance, infinite if
    none was found.

    The draws of a random model are fixed while blocks have one size, and then drawn again, which
    moves the boundary in the best direction.
    """
    spent, fixed = 0, model

    def wrong(direction: Tensor, radius: float) -> bool:
        nonlocal spent
        spent += 1
        answer = fixed((pixels + radius * direction).clamp(0, 1)).argmax(dim=1)
        return bool(answer != label)

    def distance(direction: Tensor, most: float) -> float:
        """Of the boundary in a direction, by bisection; infinite if it is farther than `most`."""
        if not wrong(direction, most):
            return math.inf
        low = 0.0
        while most - low > PRECISION and spent < budget.queries:
            middle = (low + most) / 2
            low, most = (low, middle) if wrong(direction, middle) else (middle, most)
        return most

    best, nearest, blocks = torch.ones_like(pixels), math.inf, 1
    while spent < budget.queries:
        fixed = fix_draws(model, budget.draws)
        if not spent or fixed is not model:
            nearest = distance(best, 1.0)
        for block in torch.arange(pixels.numel(), device=pixels.device).chunk(blocks):
            if spent >= budget.queries:
                break
            flips = torch.ones_like(best).flatten().index_fill(0, block, -1)
            tried = best * flips.view_as(best)
            if (found := distance(tried, min(nearest, 1.0))) < nearest:
                best, nearest = tried, found
        blocks = min(2 * blocks, pixels.numel())
    return best, nearest
