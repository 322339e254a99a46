"""Projected gradient descent (Madry et al., ICLR 2018), untargeted, L-infinity."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from models.attacks.attack import (
    Budget,
    Model,
    cross_entropy,
    draw_start,
    loss_and_gradient,
    pick,
    start_at,
    strongest,
)

REACH = 2.5  # total length of all steps, in epsilons, as published


def pgd(
    model: Model, pixels: Tensor, labels: Tensor, budget: Budget, seeds: Sequence[int]
) -> Tensor:
    """Sign steps up the cross-entropy from a random start; see `Attack`."""
    size = REACH * budget.epsilon / max(1, budget.steps)
    low, high = (pixels - budget.epsilon).clamp(min=0), (pixels + budget.epsilon).clamp(max=1)

    def runs() -> Iterator[Tensor]:
        for run in range(budget.restarts):
            here = draw_start(pixels, budget.epsilon, seeds, run)
            best, most = here, torch.full((len(pixels),), -torch.inf, device=pixels.device)
            for _ in range(budget.steps):
                at = loss_and_gradient(model, here, labels, cross_entropy, budget.draws)
                best, most = pick(at.score > most, here, best), torch.maximum(at.score, most)
                here = (here + size * at.gradient.sign()).clamp(low, high)
            yield best
            yield here  # after the last step, not scored yet

    return strongest(model, pixels, labels, budget, runs())


def ascend(
    pixels: Tensor,
    loss: Callable[[Tensor], Tensor],
    epsilon: float,
    steps: int,
    step_size: float,
    generator: torch.Generator | None = None,
) -> Tensor:
    """PGD for training: the pixels [N, 3, S, S] after the last step, at most `epsilon` away.

    Args:
        pixels: clean images in [0, 1]; `epsilon` and `step_size` are in the same scale.
        loss: maps pixels to a scalar to raise; a sum over images, so that they do not scale each
            other.
        generator: draws the random start within the ball; None starts at the clean image.
    """
    start = pixels
    if generator is not None:
        start = start_at(pixels, epsilon, torch.rand(pixels.shape, generator=generator))
    attacked = start
    for ahead in take_steps(pixels, loss, epsilon, steps, step_size, start):
        attacked = ahead
    return attacked


def take_steps(
    pixels: Tensor,
    loss: Callable[[Tensor], Tensor],
    epsilon: float,
    steps: int,
    step_size: float,
    start: Tensor,
) -> Iterator[Tensor]:
    """As `ascend`, from `start`; yields the pixels after each step."""
    low, high = (pixels - epsilon).clamp(min=0), (pixels + epsilon).clamp(max=1)
    attacked = start
    for _ in range(steps):
        attacked = attacked.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(attacked), attacked)
        attacked = (attacked + step_size * gradient.sign()).clamp(low, high).detach()
        yield attacked
