"""Test-time counterattack (TTC, Xing et al., CVPR 2025, arXiv 2503.03613).

Noise hardly moves the features of an attacked image. Where it moves them little, this defense
moves the image's own pixels, within a small ball, so that the features end as far away as possible;
no prompt and no label takes part. Plain CLIP classifies the result. An image that takes no step
keeps its noise, as published.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from models.clip import PromptedCLIP
from models.defenses.catalog import DefenseSpec
from models.defenses.defense import DefenseInput, DefenseOutput
from models.tapt import Leaving

SPEC = DefenseSpec(
    name="ttc",
    description="Counterattacks: moves the image's pixels where noise hardly moves its features.",
    prompts="none",
    views="one",
    adapts=True,
    readout="single",
    steps=2,
    order=7,
)


@dataclass(frozen=True, slots=True)
class Counterattack:
    """The published parameters.

    Attributes:
        eps: radius of the ball, of [0, 1] pixels; `stride`: length of a step.
        tau: images whose features noise moves by a smaller share are counterattacked.
        beta: each step's delta weighs e^beta times the one before it.
    """

    eps: float = 4 / 255
    stride: float = 1 / 255
    tau: float = 0.2
    beta: float = 2.0


@dataclass(frozen=True, slots=True)
class MovedPixels:
    """Requests that leave together: indices, what is added to their pixels, steps taken."""

    rows: list[int]
    deltas: Tensor
    steps: int


PUBLISHED = Counterattack()


def defend(clip: PromptedCLIP, inputs: DefenseInput) -> Iterator[DefenseOutput]:
    """Noise and steps are constants to a caller that differentiates the answer."""
    pixels, labels = inputs.views[:, 0], inputs.plain
    held = pixels.detach()
    noise = draw_noise(held, inputs.seeds, PUBLISHED.eps)
    with torch.no_grad():
        first = clip.encode_images(torch.stack([held, held + noise], dim=1))
        initial = clip.class_logits(first.features[:, :1], labels.features, labels.batch)
    leaving = inputs.adaptation.leaving
    for moved in counterattack(clip, held, noise, first.projected, PUBLISHED, leaving):
        adapted, rows = time.perf_counter(), moved.rows
        features = clip.encode_images((pixels[rows] + moved.deltas).unsqueeze(1)).features
        own = labels.select(rows)
        logits = clip.class_logits(features, own.features, own.batch)
        yield DefenseOutput(rows, initial[rows], logits, adapted, steps=moved.steps)


def draw_noise(pixels: Tensor, seeds: Sequence[int], eps: float) -> Tensor:
    """Uniform noise in [-eps, eps] that keeps pixels [B, ..., 3, S, S] in [0, 1], one seed per
    request; drawn on the host, so that device and batch do not change it."""
    shape = pixels.shape[1:]
    drawn = [torch.rand(shape, generator=torch.Generator().manual_seed(s)) for s in seeds]
    return _confine(eps * (2 * torch.stack(drawn).to(pixels.device) - 1), pixels, eps)


def drift_ratio(projected: Tensor) -> Tensor:
    """How far noise moves the features, [B], as a share of their length.

    Args:
        projected: unnormalized features [B, 2, D] of the image, and of the image with noise.
    """
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
) -> Iterator[MovedPixels]:
    """Move the pixels of those images that noise hardly moves; the others keep their noise.

    Args:
        pixels, noise: [B, 3, S, S]; the noise is the delta that the steps start from.
        projected: as in `drift_ratio`.
        leaving: not asked for images that take no step.
    """
    false_stable = (drift_ratio(projected) < recipe.tau).tolist()
    rows = [row for row, stable in enumerate(false_stable) if stable]
    if others := [row for row, stable in enumerate(false_stable) if not stable]:
        yield MovedPixels(others, noise[others], 0)
    views, start, still = pixels.unsqueeze(1), noise.unsqueeze(1), projected[:, :1]
    for out, trail in climb(clip, views, start, still, recipe.eps, recipe.stride, rows, leaving):
        yield MovedPixels(out, _settle(trail[:, :, 0], recipe.beta), len(trail) - 1)


def climb(
    clip: PromptedCLIP,
    pixels: Tensor,
    start: Tensor,
    still: Tensor,
    eps: float,
    stride: float,
    rows: list[int],
    leaving: Leaving,
) -> Iterator[tuple[list[int], Tensor]]:
    """Move views up the squared distance of their features from the original ones.

    Args:
        pixels, start: views [B, V, 3, S, S] in [0, 1], and the deltas that the steps start from.
        still: the unnormalized features [B, V, D] to move away from.
        eps, stride: radius of the ball and length of a step, of [0, 1] pixels.
        rows: the requests to move, as indices into B.

    Yields:
        Requests as they leave, and their deltas [steps + 1, n, V, 3, S, S]: the start, and those
        after each step.
    """
    trail = [start]
    while rows:
        leave = leaving(len(trail) - 1, rows)
        if out := [row for row in rows if row in leave.done]:
            yield out, torch.stack([delta[out] for delta in trail])
        rows = [row for row in rows if row not in leave.done | leave.dropped]
        if rows:
            delta = trail[-1].clone()
            delta[rows] = _step(clip, pixels[rows], trail[-1][rows], still[rows], eps, stride)
            trail.append(delta)


@torch.enable_grad()
def _step(
    clip: PromptedCLIP, pixels: Tensor, delta: Tensor, still: Tensor, eps: float, stride: float
) -> Tensor:
    """The next deltas [n, V, 3, S, S]: one stride up the squared distance from `still`."""
    delta = delta.detach().requires_grad_()
    moved = clip.encode_images(pixels + delta).projected
    (gradient,) = torch.autograd.grad((moved - still).square().sum(), delta)
    return _confine(delta.detach() + stride * gradient.sign(), pixels, eps)


def step_weights(steps: int, beta: float) -> Tensor:
    """Weights of the noise and of each step's delta, [steps + 1]; they sum to 1."""
    return (beta * torch.arange(steps + 1.0)).softmax(dim=0)


def _settle(trail: Tensor, beta: float) -> Tensor:
    """The weighted mean [n, 3, S, S] of all steps' deltas [steps + 1, n, 3, S, S]."""
    weights = step_weights(len(trail) - 1, beta).to(trail.device)
    return (weights.view(-1, 1, 1, 1, 1) * trail).sum(dim=0)


def _confine(delta: Tensor, pixels: Tensor, eps: float) -> Tensor:
    """Deltas within eps whose pixels stay in [0, 1]."""
    return delta.clamp(-eps, eps).clamp(-pixels, 1 - pixels)
