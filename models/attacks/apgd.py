"""Auto-PGD (Croce and Hein, ICML 2020): momentum, and a step size that halves when progress stalls.

It runs on the cross-entropy and, targeted, on the difference of logits ratio, whose gradient does
not vanish where the model is confident. The losses of a random model are compared on draws that
are fixed for a run; its gradients are those of fresh draws.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from models.attacks.attack import (
    Budget,
    Loss,
    LossAndGradient,
    Model,
    cross_entropy,
    draw_start,
    fix_draws,
    loss_and_gradient,
    loss_only,
    pick,
    strongest,
)

MOMENTUM = 0.75
RISES = 0.75  # of the steps between two checkpoints that must raise the loss


def apgd(
    model: Model, pixels: Tensor, labels: Tensor, budget: Budget, seeds: Sequence[int]
) -> Tensor:
    """Attack the cross-entropy, then aim at each of the likeliest other classes; see `Attack`."""
    with torch.no_grad():
        logits = model(pixels)
    others = logits.scatter(1, labels.unsqueeze(1), -torch.inf).argsort(dim=1, descending=True)
    targets = others[:, : min(budget.targets, logits.shape[1] - 1)].unbind(dim=1)

    def runs() -> Iterator[Tensor]:
        for run in range(budget.restarts):
            losses = [cross_entropy, *(aim(target) for target in targets)]
            for number, loss in enumerate(losses):
                start = draw_start(pixels, budget.epsilon, seeds, 1000 * (run + 1) + number)
                yield from climb(model, pixels, labels, loss, budget, start)

    return strongest(model, pixels, labels, budget, runs())


def climb(
    model: Model, pixels: Tensor, labels: Tensor, loss: Loss, budget: Budget, start: Tensor
) -> tuple[Tensor, Tensor]:
    """One run from `start` (algorithm 1): per image the pixels that scored highest, and the last
    ones."""
    fixed = fix_draws(model, budget.draws)

    def evaluate(here: Tensor) -> LossAndGradient:
        at = loss_and_gradient(model, here, labels, loss, budget.draws)
        if fixed is model:
            return at
        return replace(loss_only(fixed, here, labels, loss, 1), gradient=at.gradient)

    epsilon, marks = budget.epsilon, checkpoints(budget.steps)
    low, high = (pixels - epsilon).clamp(min=0), (pixels + epsilon).clamp(max=1)
    here = before = start
    at = evaluate(here)
    kept, score = here, at.score
    peak, top, uphill = here, at.loss, at.gradient
    size = torch.full_like(at.loss, 2 * epsilon)
    rises, last_top, last_mark = torch.zeros_like(at.loss), top, 0
    halved = torch.zeros_like(at.wrong)
    gradient = at.gradient
    for step in range(1, budget.steps + 1):
        stride = size.view(-1, 1, 1, 1) * gradient.sign()
        ahead = (here + stride).clamp(low, high)
        share = MOMENTUM if step > 1 else 1.0
        onward = here + share * (ahead - here) + (1 - share) * (here - before)
        before, here, loss_before = here, onward.clamp(low, high), at.loss
        at = evaluate(here)
        gradient = at.gradient
        kept, score = pick(at.score > score, here, kept), torch.maximum(at.score, score)
        rises = rises + (at.loss > loss_before)
        higher = at.loss > top
        peak, uphill = pick(higher, here, peak), pick(higher, gradient, uphill)
        top = torch.maximum(at.loss, top)
        if step in marks:
            stuck = ~halved & (top <= last_top)
            halved = (rises < RISES * (step - last_mark)) | stuck
            size = torch.where(halved, size / 2, size)
            here, gradient = pick(halved, peak, here), pick(halved, uphill, gradient)
            rises, last_top, last_mark = torch.zeros_like(rises), top, step
    return kept, here


def checkpoints(steps: int) -> set[int]:
    """The steps after which the step size is reconsidered, at shrinking intervals (section 3.2)."""
    marks, share, length = set(), 22, 22  # percent
    while (mark := math.ceil(share * steps / 100)) < steps:
        marks.add(mark)
        length = max(length - 3, 6)
        share += length
    return marks


def aim(target: Tensor) -> Loss:
    """The targeted difference of logits ratio (equation 7) for target classes [N].

    With three classes the smallest logit replaces the missing fourth. With two the ratio would be
    constant, and the loss is the difference itself.
    """

    def ratio(logits: Tensor, labels: Tensor) -> Tensor:
        ordered = logits.sort(dim=1, descending=True).values
        last = logits.shape[1] - 1
        spread = ordered[:, 0] - 0.5 * (ordered[:, min(2, last)] + ordered[:, min(3, last)])
        if logits.shape[1] < 3:
            spread = torch.ones_like(spread)
        wanted = logits.gather(1, torch.stack([labels, target], dim=1))
        return (wanted[:, 1] - wanted[:, 0]) / (spread + 1e-12)

    return ratio
