"""Multi-view guided adaptive counterattack (MAC, Kim and Um, CVPR 2026, arXiv 2606.06938).

As `ttc`, this defense moves pixels within a small ball so that the features end far from where an
attack may have put them. It does so for the image and for an augmented view of it. A view counts
as attacked if another augmentation moves its features far, and its delta is weighted accordingly.
The views' logits are averaged.

From the paper and its code (github.com/sunoh-kim/MAC): two views, four signed steps up the squared
distance of the unnormalized features from a uniform start, a ball of 8/255, the degree of
corruption and its sigmoid with threshold 0.7 and temperature 0.01 (chosen there for ViT-B/32), the
mean of logits, and the augmentations, except for the differences listed in `augmentation`. Ours: a
request takes no step where every weight is negligible; and where an attacker differentiates the
answer, the deltas and their weights are constants (BPDA).
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from models.clip import PromptedCLIP
from models.defenses.augmentation import augment
from models.defenses.catalog import DefenseSpec
from models.defenses.counterattack import MovedPixels, climb, draw_noise, drift_ratio
from models.defenses.defense import DefenseInput, DefenseOutput
from models.tapt import Leaving

SPEC = DefenseSpec(
    name="mac",
    description="Counterattacks the image and an augmented view where augmenting moves their "
    "features far (MAC).",
    prompts="none",
    views="one",
    adapts=True,
    readout="all",
    steps=4,
    images=2,
    order=8,
)


@dataclass(frozen=True, slots=True)
class AdaptiveCounterattack:
    """The published parameters.

    Attributes:
        eps: radius of the ball, of [0, 1] pixels; `stride`: length of a step.
        threshold, temperature: a view's delta is weighted by sigmoid((d - threshold) /
            temperature), where d is the share by which augmenting moves the view's features.
    """

    eps: float = 8 / 255
    stride: float = 2 / 255
    threshold: float = 0.7
    temperature: float = 0.01


PUBLISHED = AdaptiveCounterattack()
NEGLIGIBLE = 1e-4  # a weight by which no delta reaches a hundredth of an 8-bit level


def defend(clip: PromptedCLIP, inputs: DefenseInput) -> Iterator[DefenseOutput]:
    labels, sources = inputs.plain, [np.random.default_rng(seed) for seed in inputs.seeds]
    image = inputs.views[:, 0]
    views = torch.stack([image, augment(image, sources)], dim=1)
    held = views.detach()
    with torch.no_grad():
        again = torch.stack([augment(view, sources) for view in held.unbind(dim=1)], dim=1)
        first = clip.encode_images(torch.cat([held, again], dim=1))
        initial = clip.class_logits(first.features[:, :1], labels.features, labels.batch)
    still, shaken = first.projected.chunk(2, dim=1)
    weights = corruption_weights(still, shaken, PUBLISHED)
    leaving = inputs.adaptation.leaving
    for moved in counterattack(clip, held, still, weights, PUBLISHED, inputs.seeds, leaving):
        adapted, rows = time.perf_counter(), moved.rows
        features = clip.encode_images(views[rows] + moved.deltas).features
        own = labels.select(rows)
        logits = clip.class_logits(features, own.features, own.batch)
        yield DefenseOutput(
            rows, initial[rows], logits, adapted, averages_logits=True, steps=moved.steps
        )


def corruption_weights(still: Tensor, shaken: Tensor, recipe: AdaptiveCounterattack) -> Tensor:
    """Weights [B, V] in [0, 1] of the views' deltas, from the views' unnormalized features
    [B, V, D] and those of the views after another augmentation."""
    pairs = torch.stack([still, shaken], dim=2).flatten(0, 1)
    degree = drift_ratio(pairs).view(still.shape[:2])
    return ((degree - recipe.threshold) / recipe.temperature).sigmoid()


def counterattack(
    clip: PromptedCLIP,
    views: Tensor,
    still: Tensor,
    weights: Tensor,
    recipe: AdaptiveCounterattack,
    seeds: Sequence[int],
    leaving: Leaving,
) -> Iterator[MovedPixels]:
    """The weighted deltas [n, V, 3, S, S] of views [B, V, 3, S, S].

    Args:
        still: the views' unnormalized features [B, V, D].
        weights: [B, V], of the deltas.
        seeds: draw the noise that the steps start from, one per request.
        leaving: not asked for requests that take no step.
    """
    scale = weights.view(*weights.shape, 1, 1, 1)
    start = draw_noise(views, seeds, recipe.eps)
    matters = (weights >= NEGLIGIBLE).any(dim=1).tolist()
    if spared := [row for row, moves in enumerate(matters) if not moves]:
        yield MovedPixels(spared, scale[spared] * start[spared], 0)
    rows = [row for row, moves in enumerate(matters) if moves]
    for out, trail in climb(clip, views, start, still, recipe.eps, recipe.stride, rows, leaving):
        yield MovedPixels(out, scale[out] * trail[-1], len(trail) - 1)
