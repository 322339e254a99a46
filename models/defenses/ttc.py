"""Test-time counterattack (TTC, Xing et al., CVPR 2025, arXiv 2503.03613).

Noise hardly moves the features of an attacked image. Where it moves them little, this defense
moves the image's own pixels within a small ball, so that the features end as far away as possible.
It uses neither prompts nor labels. Plain CLIP classifies the result. An image that takes no step
keeps its noise, as published.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from models.clip import PromptedCLIP
from models.defenses.catalog import DefenseSpec
from models.defenses.counterattack import MovedPixels, climb, draw_noise, drift_ratio
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


def step_weights(steps: int, beta: float) -> Tensor:
    """Weights of the noise and of each step's delta, [steps + 1]; they sum to 1."""
    return (beta * torch.arange(steps + 1.0)).softmax(dim=0)


def _settle(trail: Tensor, beta: float) -> Tensor:
    """The weighted mean [n, 3, S, S] of all steps' deltas [steps + 1, n, 3, S, S]."""
    weights = step_weights(len(trail) - 1, beta).to(trail.device)
    return (weights.view(-1, 1, 1, 1, 1) * trail).sum(dim=0)
