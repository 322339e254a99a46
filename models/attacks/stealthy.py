"""An attack that also keeps the suspicion score low: the wrong answer must not be noticed.

It climbs the margin of the mean prediction as far as it needs to, less a penalty for suspicion.
"""

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from models.attacks.ascent import climb
from models.attacks.attack import (
    RESCORED,
    Budget,
    LossAndGradient,
    Model,
    Suspecting,
    draw_start,
    margin,
    worst,
)

QUIET = 0.25  # suspicion that is not penalized; low even for a clean image
ENOUGH = 1.0  # nats by which a wrong class should lead
PENALTY = 5.0  # nats that a suspicion of 1 costs


def stealthy(
    model: Model, pixels: Tensor, labels: Tensor, budget: Budget, seeds: Sequence[int]
) -> Tensor:
    """Push for a wrong answer with little suspicion; see `Attack`.

    Raises:
        TypeError: the model has no suspicion score.
    """
    if not isinstance(model, Suspecting):
        raise TypeError("the stealthy attack needs a defense with a suspicion score")
    drawn = [model.draw_seeds() for _ in range(RESCORED)]

    def objective(here: Tensor) -> LossAndGradient:
        leaf = here.detach().requires_grad_()
        total, gradient = torch.zeros(len(leaf), device=leaf.device), torch.zeros_like(leaf)
        right = torch.zeros(len(leaf), device=leaf.device)
        for _ in range(budget.draws):
            losses, wrong = _rate(model, leaf, labels, model.draw_seeds())
            gradient += torch.autograd.grad(losses.sum(), leaf)[0] / budget.draws
            total += losses.detach() / budget.draws
            right += ~wrong
        return LossAndGradient(total, right < budget.draws / 2, gradient)

    @torch.no_grad()
    def judge(attacked: Tensor, seeds: Sequence[int]) -> Tensor:
        losses, wrong = _rate(model, attacked, labels, seeds)
        return LossAndGradient(losses, wrong, torch.zeros_like(attacked)).score

    def runs() -> Iterator[Tensor]:
        for run in range(budget.restarts):
            start = draw_start(pixels, budget.epsilon, seeds, run)
            yield from climb(objective, pixels, budget, start, budget.steps)

    return worst([partial(judge, seeds=each) for each in drawn], pixels, budget, runs())


def _rate(
    model: Suspecting, pixels: Tensor, labels: Tensor, seeds: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """The loss [N] to raise, and whether the answer is wrong."""
    logits, suspicion = model.observe(pixels, seeds)
    lead = margin(logits, labels)
    return lead.clamp(max=ENOUGH) - PENALTY * (suspicion - QUIET).clamp(min=0), lead > 0
