"""Test-time counterattack (TTC, Xing et al., CVPR 2025, arXiv 2503.03613).

An attacked picture sits in a place from which noise hardly moves its features. Where noise moves
them little, the picture's own pixels are moved, within a small ball, to carry the features as far
away as they go; no prompt and no label takes part. Plain CLIP classifies what comes out. A picture
that takes no step keeps its noise, as published.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from models.clip import PromptedCLIP
from models.defenses.defense import Images, Leaving, Verdict
from models.tapt import view_entropy


@dataclass(frozen=True, slots=True)
class Counterattack:
    """How pixels move, of [0, 1]: up to `eps` in `steps` of `stride`, where noise moves the
    features by less than the share `tau`; a later step weighs e^beta times the one before."""

    eps: float = 4 / 255
    stride: float = 1 / 255
    tau: float = 0.2
    beta: float = 2.0
    steps: int = 2


@dataclass(frozen=True, slots=True)
class Moved:
    """Requests that leave together: indices, what is added to their pixels, steps taken."""

    rows: list[int]
    deltas: Tensor
    steps: int


PUBLISHED = Counterattack()


def defend(clip: PromptedCLIP, images: Images) -> Iterator[Verdict]:
    pixels, labels = images.views[:, 0], images.plain
    noise = draw_noise(pixels, images.seeds, PUBLISHED.eps)
    with torch.no_grad():
        first = clip.encode_images(torch.stack([pixels, pixels + noise], dim=1))
        before = clip.class_logits(first.features[:, :1], labels.features, labels.batch)
    entropy = view_entropy(before).tolist()
    for moved in counterattack(clip, pixels, noise, first.projected, PUBLISHED, images.leaving):
        adapted, rows = time.perf_counter(), moved.rows
        with torch.no_grad():
            features = clip.encode_images((pixels[rows] + moved.deltas).unsqueeze(1)).features
            own = labels.select(rows)
            after = clip.class_logits(features, own.features, own.batch)
        entropy_after = view_entropy(after).tolist()
        for place, row in enumerate(rows):
            count = labels.batch.counts[row]
            yield Verdict(
                row=row,
                probabilities=after[place, 0, :count].softmax(dim=-1),
                views=before[row, :, :count].softmax(dim=-1),
                kept=1,
                steps=moved.steps,
                entropy_before=entropy[row],
                entropy_after=entropy_after[place],
                adapted=adapted,
            )


def draw_noise(pixels: Tensor, seeds: Sequence[int], eps: float) -> Tensor:
    """Uniform noise [B, 3, S, S] in [-eps, eps] that keeps pixels in [0, 1], a seed a picture,
    drawn on the host so that device and batch do not change it."""
    shape = pixels.shape[1:]
    drawn = [torch.rand(shape, generator=torch.Generator().manual_seed(s)) for s in seeds]
    return _confine(eps * (2 * torch.stack(drawn).to(pixels.device) - 1), pixels, eps)


def drift_ratio(projected: Tensor) -> Tensor:
    """How far noise moves the features, [B], as a share of their length; `projected` [B, 2, D] are
    those of the picture and of the picture with noise."""
    still, shaken = projected.unbind(dim=1)
    ratio: Tensor = (shaken - still).norm(dim=-1) / still.norm(dim=-1)
    return ratio


def counterattack(
    clip: PromptedCLIP,
    pixels: Tensor,
    noise: Tensor,
    projected: Tensor,
    recipe: Counterattack,
    leaving: Leaving,
) -> Iterator[Moved]:
    """Move the pixels of those pictures that noise hardly moves; the others keep their noise.

    Args:
        pixels, noise: [B, 3, S, S]; the noise is the first delta, which the steps go on from.
        projected: as in `drift_ratio`.
        leaving: not asked for pictures that take no step.
    """
    false_stable = (drift_ratio(projected) < recipe.tau).tolist()
    rows = [row for row, stable in enumerate(false_stable) if stable]
    if others := [row for row, stable in enumerate(false_stable) if not stable]:
        yield Moved(others, noise[others], 0)
    steps, trail = 0, [noise]
    while rows:
        if out := sorted(leaving(steps, rows) & set(rows)):
            path = torch.stack([delta[out] for delta in trail])
            yield Moved(out, _settle(path, recipe.beta), steps)
            rows = [row for row in rows if row not in out]
        if rows:
            delta = trail[-1].clone()
            delta[rows] = _step(clip, pixels[rows], trail[-1][rows], projected[rows, 0], recipe)
            trail.append(delta)
            steps += 1


def _step(
    clip: PromptedCLIP, pixels: Tensor, delta: Tensor, still: Tensor, recipe: Counterattack
) -> Tensor:
    """The next deltas: one stride up the squared distance from the still features [n, D]."""
    delta = delta.detach().requires_grad_()
    moved = clip.encode_images((pixels + delta).unsqueeze(1)).projected[:, 0]
    (gradient,) = torch.autograd.grad((moved - still).square().sum(), delta)
    return _confine(delta.detach() + recipe.stride * gradient.sign(), pixels, recipe.eps)


def step_weights(steps: int, beta: float) -> Tensor:
    """What the deltas of the noise and of each step count, [steps + 1]; they sum to 1."""
    return (beta * torch.arange(steps + 1.0)).softmax(dim=0)


def _settle(trail: Tensor, beta: float) -> Tensor:
    """Deltas [n, 3, S, S] of all steps [steps + 1, n, 3, S, S] as one."""
    weights = step_weights(len(trail) - 1, beta).to(trail.device)
    return (weights.view(-1, 1, 1, 1, 1) * trail).sum(dim=0)


def _confine(delta: Tensor, pixels: Tensor, eps: float) -> Tensor:
    """Deltas within eps whose pixels stay in [0, 1]."""
    return delta.clamp(-eps, eps).clamp(-pixels, 1 - pixels)
