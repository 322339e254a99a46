"""Random resized crops and flips of a batch, as tensor arithmetic (Szegedy et al., CVPR 2015).

The random numbers come from a host generator, so that one seed gives the same crops on every
device.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

ASPECT = 4 / 3  # crops are at most this much wider or taller than the image


def draw_crops(count: int, area: tuple[float, float], source: torch.Generator) -> Tensor:
    """Affine maps [count, 2, 3] of crops that cover a share of the image within `area`, in
    (0, 1], at aspect ratios from 3/4 to 4/3; each is mirrored with probability 1/2."""

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(count, generator=source) * (high - low) + low

    share, aspect = uniform(*area), uniform(-math.log(ASPECT), math.log(ASPECT)).exp()
    width, height = (share * aspect).sqrt().clamp(max=1), (share / aspect).sqrt().clamp(max=1)
    flip = torch.where(uniform(0, 1) < 0.5, -1.0, 1.0)
    theta = torch.zeros(count, 2, 3)
    theta[:, 0, 0], theta[:, 0, 2] = width * flip, uniform(-1, 1) * (1 - width)
    theta[:, 1, 1], theta[:, 1, 2] = height, uniform(-1, 1) * (1 - height)
    return theta


def cut_crops(images: Tensor, crops: Tensor, size: int) -> Tensor:
    """Images [n, 3, H, W], uint8 or float in [0, 1], to crops [n, 3, size, size] in [0, 1]."""
    shape = [len(images), 3, size, size]
    grid = F.affine_grid(crops.to(images.device), shape, align_corners=False)
    pixels = images.float() / 255 if images.dtype == torch.uint8 else images
    cut = F.grid_sample(pixels, grid, padding_mode="reflection", align_corners=False)
    return cut.clamp(0, 1)
