"""Momentum attacks on a defense that averages over random views, by loss and starting point.

Gradients of random views are noisy. Aggregated momentum (Lucas et al., ICLR 2019) averages them
over several horizons at once; with losses on the views' mean logits it is the attack that broke
random transformations where expectation over transformation alone did not (Sitawarin et al., ICML
2022). Steps are signs, and their size decays to 0.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from models.attacks.apgd import aim
from models.attacks.attack import (
    RESCORED,
    Budget,
    Loss,
    LossAndGradient,
    Model,
    Viewed,
    cross_entropy,
    draw_start,
    fix_draws,
    loss_and_gradient,
    pick,
    strongest,
)

MOMENTA = (0.0, 0.9, 0.99)
FIRST = 0.5  # length of the first step, in epsilons
WARM = 1 / 3  # of the steps, for an attack on a weaker model that only makes a starting point

LIKELIEST = 9  # classes that the targeted loss aims at, as published with AutoAttack

Start = Literal["random", "transfer", "static", "stepless"]
Aims = Callable[[Callable[[], Tensor], Tensor], list[Loss]]
"""(asks for the mean logits [N, C] of the clean images, labels [N]) -> the losses, a run each."""


@dataclass(frozen=True, slots=True)
class Ascent:
    """An `Attack` that climbs one or several losses from one starting point.

    Attributes:
        aims: the losses.
        of_logits: climb on the mean of the views' logits; else on their mean prediction.
        start: a random point, or the result of a shorter attack on a weaker model (see `Viewed`).
        share: of the budget's steps that one run takes.
    """

    aims: Aims
    of_logits: bool = True
    start: Start = "random"
    share: float = 1.0

    def __call__(
        self, model: Model, pixels: Tensor, labels: Tensor, budget: Budget, seeds: Sequence[int]
    ) -> Tensor:
        climbed = model
        if self.of_logits and isinstance(model, Viewed):
            climbed = model.averaging_logits()

        @torch.no_grad()
        def clean_logits() -> Tensor:
            return fix_draws(climbed, RESCORED)(pixels)

        losses = self.aims(clean_logits, labels)
        steps = math.ceil(self.share * budget.steps)

        def runs() -> Iterator[Tensor]:
            for run in range(budget.restarts):
                for number, loss in enumerate(losses):
                    start = draw_start(pixels, budget.epsilon, seeds, 1000 * run + number)
                    if self.start != "random" and isinstance(model, Viewed):
                        easier = Objective(model.weaker(self.start), labels, cross_entropy, budget)
                        warm = math.ceil(WARM * budget.steps)
                        _, start = climb(easier, pixels, budget, start, warm)
                    objective = Objective(climbed, labels, loss, budget)
                    best, last = climb(objective, pixels, budget, start, steps)
                    yield last
                    if len(losses) == 1:
                        yield best

        return strongest(model, pixels, labels, budget, runs())


@dataclass(frozen=True, slots=True)
class Objective:
    """A loss of a model as a function of pixels, with its gradient."""

    model: Model
    labels: Tensor
    loss: Loss
    budget: Budget

    def __call__(self, pixels: Tensor) -> LossAndGradient:
        return loss_and_gradient(self.model, pixels, self.labels, self.loss, self.budget.draws)


def climb(
    objective: Callable[[Tensor], LossAndGradient],
    pixels: Tensor,
    budget: Budget,
    start: Tensor,
    steps: int,
) -> tuple[Tensor, Tensor]:
    """One run: per image the pixels that scored highest on a draw, and the last ones."""
    low, high = (pixels - budget.epsilon).clamp(min=0), (pixels + budget.epsilon).clamp(max=1)
    here = best = start
    most = torch.full((len(pixels),), -torch.inf, dtype=torch.float64, device=pixels.device)
    velocities = [torch.zeros_like(pixels) for _ in MOMENTA]
    for step in range(steps):
        at = objective(here)
        best, most = pick(at.score > most, here, best), torch.maximum(at.score, most)
        scale = at.gradient.abs().mean(dim=(1, 2, 3), keepdim=True).clamp(min=1e-30)
        pairs = zip(MOMENTA, velocities, strict=True)
        velocities = [share * velocity + at.gradient / scale for share, velocity in pairs]
        size = FIRST * budget.epsilon * (1 + math.cos(math.pi * step / steps)) / 2
        here = (here + size * torch.stack(velocities).sum(dim=0).sign()).clamp(low, high)
    return best, here


def untargeted(loss: Loss) -> Aims:
    """Climb one loss away from the true class."""
    return lambda clean_logits, labels: [loss]


def towards_likeliest(clean_logits: Callable[[], Tensor], labels: Tensor) -> list[Loss]:
    """The targeted difference of logits ratio, for each of the likeliest other classes."""
    clean = clean_logits()
    others = clean.scatter(1, labels.unsqueeze(1), -torch.inf).argsort(dim=1, descending=True)
    count = min(LIKELIEST, clean.shape[1] - 1)
    return [aim(target) for target in others[:, :count].unbind(dim=1)]


def off_clean_feature(clean_logits: Callable[[], Tensor], labels: Tensor) -> list[Loss]:
    """The squared distance of the views' mean embedding from the clean one, whatever the labels.

    Mean logits are that embedding times the labels' embeddings; the distance is measured in them.
    """
    clean = clean_logits()
    return [lambda logits, labels: (logits - clean).square().mean(dim=1)]
