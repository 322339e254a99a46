"""Mild random augmentations: affine, color, blur and noise, as published with MAC.

Ranges and probabilities are those of the code of MAC (arXiv 2606.06938). Three things differ. The
blur is a share of the side, as it is there at 224 pixels: a small model would see little of an
image blurred as much in pixels. Brightness, contrast, saturation and hue change in this order, not
in a random one. The hue is rotated in YIQ, not in HSV. All of it is differentiable, and a result
does not depend on the rest of the batch.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

ROTATION = math.radians(5)
SHIFT = 0.04  # of a side
SCALE = 0.08
BRIGHTNESS = CONTRAST = SATURATION = 0.08
HUE = 0.02  # of a full turn
BLUR = (0.5 / 224, 1.2 / 224)  # standard deviation, of a side
NOISE = 0.02  # largest standard deviation, of [0, 1] pixels
PROBABILITY = 0.5  # of each of color, blur and noise; the affine map always applies
RADIUS = 2  # of the blur's kernel, in pixels

LUMA = (0.2989, 0.587, 0.114)  # ITU-R 601-2
TO_YIQ = torch.tensor([LUMA, (0.5959, -0.2746, -0.3213), (0.2115, -0.5227, 0.3112)])


@dataclass(frozen=True, slots=True)
class Draw:
    """What is drawn for one image; a part that does not apply changes nothing.

    Attributes:
        affine: [2, 3], maps places of the result to places of the image, both in [-1, 1].
        brightness, contrast, saturation: factors.
        hue: angle in radians.
        blur: the kernel [2 * RADIUS + 1].
        noise: [3, S, S], added to the pixels.
    """

    affine: NDArray[np.float32]
    brightness: float
    contrast: float
    saturation: float
    hue: float
    blur: NDArray[np.float32]
    noise: NDArray[np.float32]


def augment(pixels: Tensor, sources: Sequence[np.random.Generator]) -> Tensor:
    """Augment images [N, 3, S, S] in [0, 1], each by a draw from its own source."""
    draws = [draw_augmentation(source, pixels.shape[-1]) for source in sources]

    def gather(name: str) -> Tensor:
        values = np.stack([np.asarray(getattr(draw, name), np.float32) for draw in draws])
        return torch.from_numpy(values).to(pixels.device)

    def factor(name: str) -> Tensor:
        return gather(name).view(-1, 1, 1, 1)

    grid = F.affine_grid(gather("affine"), list(pixels.shape), align_corners=False)
    pixels = F.grid_sample(pixels, grid, align_corners=False)
    pixels = _blend(pixels, torch.zeros_like(pixels), factor("brightness"))
    pixels = _blend(pixels, _gray(pixels).mean(dim=(2, 3), keepdim=True), factor("contrast"))
    pixels = _blend(pixels, _gray(pixels), factor("saturation"))
    pixels = _rotate_hue(pixels, gather("hue"))
    pixels = _blur(pixels, gather("blur"))
    return (pixels + gather("noise")).clamp(0, 1)


def draw_augmentation(source: np.random.Generator, size: int) -> Draw:
    """A draw for an image of `size` x `size` pixels."""
    angle, scale = source.uniform(-ROTATION, ROTATION), source.uniform(1 - SCALE, 1 + SCALE)
    shift = 2 * source.uniform(-SHIFT, SHIFT, 2)  # a side is 2 long in [-1, 1]
    cos, sin = math.cos(angle) / scale, math.sin(angle) / scale
    back = np.array([[cos, sin], [-sin, cos]])
    colored, blurred, noisy = source.uniform(size=3) < PROBABILITY
    color = source.uniform(-1, 1, 4) * colored
    places = np.arange(-RADIUS, RADIUS + 1)
    spread = source.uniform(*BLUR) * size
    kernel = np.exp(-0.5 * (places / spread) ** 2) if blurred else places == 0
    deviation = source.uniform(0, NOISE) * noisy
    return Draw(
        affine=np.column_stack([back, -back @ shift]).astype(np.float32),
        brightness=1 + BRIGHTNESS * color[0],
        contrast=1 + CONTRAST * color[1],
        saturation=1 + SATURATION * color[2],
        hue=2 * math.pi * HUE * color[3],
        blur=(kernel / kernel.sum()).astype(np.float32),
        noise=(deviation * source.standard_normal((3, size, size))).astype(np.float32),
    )


def _gray(pixels: Tensor) -> Tensor:
    """Luma [N, 1, S, S]."""
    weights = torch.tensor(LUMA, device=pixels.device).view(3, 1, 1)
    return (weights * pixels).sum(dim=1, keepdim=True)


def _blend(pixels: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    """`factor` of the pixels and the rest of the other image, kept in [0, 1]."""
    return (factor * pixels + (1 - factor) * other).clamp(0, 1)


def _rotate_hue(pixels: Tensor, angle: Tensor) -> Tensor:
    """Rotate the colors of images by angles [N]; the luma stays."""
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
    turn = torch.stack([zero + 1, zero, zero, zero, cos, -sin, zero, sin, cos], dim=1)
    basis = TO_YIQ.to(pixels.device)
    matrix = basis.inverse() @ turn.view(-1, 3, 3) @ basis
    turned = (matrix.view(-1, 3, 3, 1, 1) * pixels.unsqueeze(1)).sum(dim=2)
    unturned = (angle == 0).view(-1, 1, 1, 1)  # the inverse is not exact
    return torch.where(unturned, pixels, turned.clamp(0, 1))


def _blur(pixels: Tensor, kernel: Tensor) -> Tensor:
    """Blur images by kernels [N, 2 * RADIUS + 1], along rows and along columns."""
    size, taps = pixels.shape[-1], kernel.view(len(kernel), -1, 1, 1, 1).unbind(dim=1)
    padded = F.pad(pixels, (RADIUS,) * 4, mode="reflect")
    wide = torch.stack([tap * padded[..., i : i + size] for i, tap in enumerate(taps)]).sum(dim=0)
    return torch.stack([tap * wide[..., i : i + size, :] for i, tap in enumerate(taps)]).sum(dim=0)
