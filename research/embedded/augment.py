"""Random crops, flips, colors and mixes of a batch of images, as tensor arithmetic.

All random numbers come from a host generator, so the same seed gives the same batch on every
device, and a resumed run sees what an uninterrupted one would have seen.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from models.calibration.crops import cut_crops, draw_crops


@dataclass(frozen=True)
class Mix:
    """Which image was mixed into which: row i holds `share` of i and 1 - share of partner[i]."""

    partner: Tensor
    share: float

    def labels(self, labels: Tensor, classes: int) -> Tensor:
        """Mixed one-hot labels [batch, classes]."""
        hot = F.one_hot(labels, classes).float()
        return self.share * hot + (1 - self.share) * hot[self.partner.to(labels.device)]


def crop(images: Tensor, size: int, generator: torch.Generator, smallest: float = 0.35) -> Tensor:
    """Random resized crop and horizontal flip: uint8 or float [batch, 3, height, width] to float
    in [0, 1] of [batch, 3, size, size]. A crop covers between `smallest` and all of the area."""
    return cut_crops(images, draw_crops(len(images), (smallest, 1.0), generator), size)


def jitter(
    images: Tensor, strength: float, generator: torch.Generator, gray: float = 0.0
) -> Tensor:
    """Random brightness, contrast and saturation, each scaled by 1 +- strength; stays in [0, 1].

    With probability `gray` an image's saturation is 0.
    """
    factors = 1 + strength * (2 * torch.rand(3, len(images), 1, 1, 1, generator=generator) - 1)
    factors[2] *= torch.rand(len(images), 1, 1, 1, generator=generator) >= gray
    brightness, contrast, saturation = factors.to(images.device)
    images = images * brightness
    images = torch.lerp(images.mean((1, 2, 3), keepdim=True), images, contrast)
    return torch.lerp(images.mean(1, keepdim=True), images, saturation).clamp(0, 1)


def mix(images: Tensor, probability: float, generator: torch.Generator) -> tuple[Tensor, Mix]:
    """With the given probability one mixup (Zhang et al. 2018) or CutMix (Yun et al. 2019) of
    the whole batch with its own reverse; both with a uniform share, that is Beta(1, 1).
    """
    count, _, height, width = images.shape
    chance, kind, share, y, x = torch.rand(5, generator=generator).tolist()
    partner = torch.arange(count).flip(0)
    if chance >= probability:
        return images, Mix(partner, 1.0)
    if kind < 0.5:
        return torch.lerp(images.flip(0), images, share), Mix(partner, share)
    side = math.sqrt(1 - share)
    rows, columns = round(height * side), round(width * side)
    top, left = round(y * (height - rows)), round(x * (width - columns))
    mixed = images.clone()
    box = (slice(None), slice(None), slice(top, top + rows), slice(left, left + columns))
    mixed[box] = images.flip(0)[box]
    return mixed, Mix(partner, 1 - rows * columns / (height * width))


def skip_blocks(tower: Any, drop: float, generator: torch.Generator) -> list[Any]:
    """Stochastic depth (Huang et al. 2016) on a vision tower: handles of the hooks, to be removed.

    A sample skips the last block with probability `drop`, earlier ones linearly less often; what
    a block adds is scaled so that its mean stays.
    """

    def hook(rate: float) -> Callable[..., Any]:
        def skip(_: Any, inputs: Any, output: Any) -> Any:
            before, after = inputs[0], output[0] if isinstance(output, tuple) else output
            kept = torch.rand(len(before), 1, 1, generator=generator) >= rate
            scale = (kept / (1 - rate)).to(before)
            mixed = before + scale * (after - before)
            return (mixed, *output[1:]) if isinstance(output, tuple) else mixed

        return skip

    blocks = list(tower.encoder.layers) if drop else []
    return [
        block.register_forward_hook(hook(drop * (place + 1) / len(blocks)))
        for place, block in enumerate(blocks)
    ]
