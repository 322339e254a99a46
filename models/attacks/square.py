"""The Square attack (Andriushchenko et al., ECCV 2020): random search by scores, without gradients.

It is not affected by masked gradients: where it beats a gradient attack, gradients are masked.
"""

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from models.attacks.attack import Budget, Model, fix_draws, loss_only, margin, pick, strongest

SHARE = 0.8  # of the image that the first square covers
REDRAW = 50  # queries after which a random model draws again, so as not to fit one draw
HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)  # queries of 10,000, as published


def square(
    model: Model, pixels: Tensor, labels: Tensor, budget: Budget, seeds: Sequence[int]
) -> Tensor:
    """Squares of one color at the edge of the ball, kept where they raise the margin; see `Attack`.

    The search goes on after the model is wrong, because another model may still be right.
    """

    def runs() -> Iterator[Tensor]:
        for run in range(budget.restarts):
            sources = [np.random.default_rng([seed, run]) for seed in seeds]
            yield search(model, pixels, labels, budget, sources)

    return strongest(model, pixels, labels, budget, runs())


def search(
    model: Model,
    pixels: Tensor,
    labels: Tensor,
    budget: Budget,
    sources: Sequence[np.random.Generator],
) -> Tensor:
    """One run: vertical stripes first, then ever smaller squares.

    A random model's draws are fixed and drawn again every `REDRAW` queries. The best image so far
    is then scored again, which costs a query.
    """
    size, asked = pixels.shape[-1], fix_draws(model, budget.draws)
    # A model that cannot fix its draws is averaged over calls.
    draws = budget.draws if asked is model else 1

    def signs(*shape: int) -> Tensor:
        drawn = [source.choice([-1.0, 1.0], shape) for source in sources]
        return torch.from_numpy(np.stack(drawn)).to(pixels)

    best = (pixels + budget.epsilon * signs(3, 1, size)).clamp(0, 1)
    most = loss_only(asked, best, labels, margin, draws).loss
    for query in range(1, budget.queries):
        if asked is not model and query % REDRAW == 0:
            asked = fix_draws(model, budget.draws)
            most = loss_only(asked, best, labels, margin, draws).loss
            continue
        side = side_of(query, budget.queries, size)
        colors = signs(3, 1, 1)
        inside = torch.zeros_like(pixels, dtype=torch.bool)
        for row, source in enumerate(sources):
            top, left = source.integers(0, size - side + 1, 2)
            inside[row, :, top : top + side, left : left + side] = True
        tried = torch.where(inside, (pixels + budget.epsilon * colors).clamp(0, 1), best)
        found = loss_only(asked, tried, labels, margin, draws).loss
        best, most = pick(found > most, tried, best), torch.maximum(found, most)
    return best


def side_of(query: int, queries: int, size: int) -> int:
    """The side in pixels of the square that a query changes."""
    passed = sum(query / queries * 10_000 > mark for mark in HALVINGS)
    return min(size, max(1, round(math.sqrt(SHARE / 2**passed) * size)))
