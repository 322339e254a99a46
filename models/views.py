"""Random views of an image, made on the device from one upload of its uint8 pixels.

View 0 is the image after the checkpoint's own preprocessing; the others are random resized crops
with flips. A view is two matrix products, one per side, with Pillow's antialiased resampling
weights: no loop over views, and the same pixels as Pillow up to rounding.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.device import upload
from models.images.preprocess import (
    AREA,
    BICUBIC,
    BILINEAR,
    BOX,
    HAMMING,
    LANCZOS,
    NEAREST,
    Preprocessing,
)

RATIO = (3 / 4, 4 / 3)  # aspect ratio of the crops, as published
ATTEMPTS = 10  # tries for a crop that fits before falling back to the center


def make_views(
    image: NDArray[np.uint8] | Tensor,
    views: int,
    seed: int,
    preprocessing: Preprocessing,
    device: torch.device,
    first: NDArray[np.uint8] | None = None,
) -> Tensor:
    """Views [views, 3, S, S] of one image, multiples of 1/255 in [0, 1].

    Args:
        image: uint8 RGB [height, width, 3] of any size; or whole values [3, height, width] in
            [0, 255] as a tensor, to which the views pass a gradient: straight through rounding.
        seed: draws the crops on the host, so that device and batch do not change them.
        first: view 0, uint8 RGB [S, S, 3], if `image` was scaled down before: see `DecodedImage`.
    """
    pixels = image
    if not isinstance(pixels, Tensor):
        pixels = upload(pixels, device).permute(2, 0, 1).float()
    if first is not None:
        whole = upload(first, device).permute(2, 0, 1).unsqueeze(0) / 255
    else:
        weights = (each.unsqueeze(0) for each in _whole(pixels, preprocessing))
        whole = _resample(pixels, *weights)
    if views == 1:
        return whole
    height, width = pixels.shape[1:]
    boxes, flips = draw_crops(views - 1, seed, height, width, preprocessing.area)
    top, left, high, wide = upload(boxes.astype(np.float32), device).T
    places = torch.arange(preprocessing.crop, device=device)
    size = preprocessing.crop
    rows = _weights(top, high, places, size, height, BILINEAR)
    columns = _weights(left, wide, places, size, width, BILINEAR)
    flipped = upload(flips, device).view(-1, 1, 1)
    columns = torch.where(flipped, columns.flip(1), columns)
    return torch.cat([whole, _resample(pixels, rows, columns)])


def draw_crops(
    count: int, seed: int, height: int, width: int, share: tuple[float, float] = AREA
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Boxes [count, 4] (top, left, height, width) of random resized crops, and flips [count].

    Args:
        share: smallest and largest share of the image's area in a crop.
    """
    rng = np.random.default_rng(seed)
    area = rng.uniform(*share, (count, ATTEMPTS)) * height * width
    aspect = np.exp(rng.uniform(math.log(RATIO[0]), math.log(RATIO[1]), (count, ATTEMPTS)))
    places, flips = rng.uniform(size=(2, count)), rng.uniform(size=count) < 0.5
    widths, heights = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
    fits = (widths > 0) & (widths <= width) & (heights > 0) & (heights <= height)
    pick = (np.arange(count), fits.argmax(axis=1))
    fallback = ~fits.any(axis=1)
    w = np.where(fallback, min(width, round(height * RATIO[1])), widths[pick])
    h = np.where(fallback, min(height, round(width / RATIO[0])), heights[pick])
    top = np.where(fallback, (height - h) // 2, np.floor(places[0] * (height - h + 1)))
    left = np.where(fallback, (width - w) // 2, np.floor(places[1] * (width - w + 1)))
    return np.stack([top, left, h, w], axis=1).astype(np.int64), flips


def _whole(pixels: Tensor, preprocessing: Preprocessing) -> list[Tensor]:
    """Weights [S, height] and [S, width] of the resize followed by the center crop."""
    weights = []
    sides = pixels.shape[1:]
    for side, resized in zip(sides, preprocessing.resized(*sides), strict=True):
        margin = (resized - preprocessing.crop) // 2
        wanted = torch.arange(preprocessing.crop, device=pixels.device) + margin
        places = wanted.clamp(0, resized - 1)
        if preprocessing.resample in (NEAREST, BOX):
            at = np.clip(np.arange(preprocessing.crop) + margin, 0, resized - 1)
            full = upload(_abrupt(at, resized, side, preprocessing.resample), pixels.device)
        else:
            start, length = pixels.new_zeros(1), pixels.new_full((1,), side)
            full = _weights(start, length, places, resized, side, preprocessing.resample)[0]
        weights.append(full * (wanted == places).unsqueeze(1))
    return weights


def _weights(
    start: Tensor, length: Tensor, places: Tensor, size: int, side: int, resample: int
) -> Tensor:
    """Pillow's resampling weights [n, p, side]; rows sum to 1.

    For each of n boxes, the pixels [start, start + length) of a side are resampled to `size`
    pixels, of which `places` [p] are wanted.
    """
    kernel, support = FILTERS[resample]
    scale, begin = (length / size).view(-1, 1, 1), start.view(-1, 1, 1)
    centers = begin + (places.view(1, -1, 1) + 0.5) * scale
    pixels = torch.arange(side, device=start.device).view(1, 1, -1) + 0.5
    offset = (pixels - centers) / scale.clamp(min=1)
    inside = (pixels > begin) & (pixels < begin + length.view(-1, 1, 1))
    weights = kernel(offset) * (inside & (offset.abs() < support))
    return weights / weights.sum(dim=-1, keepdim=True)


def _abrupt(places: NDArray[np.int64], size: int, side: int, resample: int) -> NDArray[np.float32]:
    """As `_weights` for a whole side, [p, side], under filters by which a pixel counts or does not.

    Rounding decides which do, so the arithmetic and its order are Pillow's, in double precision.
    """
    scale = side / size
    pixels = np.arange(side)
    if resample == NEAREST:
        steps = np.full(size, scale)
        steps[0] /= 2
        picked = np.add.accumulate(steps)[places].astype(int)
        counted = pixels == picked[:, None]
    else:
        wide = max(1.0, scale)
        centers = (places[:, None] + 0.5) * scale
        first, last = (np.floor(centers + sign * wide / 2 + 0.5) for sign in (-1, 1))
        offset = (pixels - centers + 0.5) * (1 / wide)
        counted = (first <= pixels) & (pixels < last) & (offset > -0.5) & (offset <= 0.5)
    weights: NDArray[np.float32] = (counted / counted.sum(axis=1, keepdims=True)).astype(np.float32)
    return weights


def _resample(pixels: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Resample [3, height, width] in [0, 255] by weights [n, S, height] and [n, S, width].

    Each pass rounds to whole values as Pillow does, so that a view is what a file would hold.
    """
    count, size, _ = rows.shape
    channels, height, width = pixels.shape
    wide = round_levels(pixels.reshape(-1, width) @ columns.flatten(0, 1).T)
    wide = wide.view(channels, height, count, size).permute(2, 1, 0, 3).flatten(2)
    views = round_levels(rows @ wide).view(count, size, channels, size)
    return views.transpose(1, 2) / 255


def round_levels(values: Tensor) -> Tensor:
    """Round to whole values in [0, 255]. The gradient passes straight through, so that an attack
    can differentiate views."""
    rounded: Tensor = _Round.apply(values)  # type: ignore[no-untyped-call]
    return rounded


class _Round(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, values: Tensor) -> Tensor:
        return (values + 0.5).floor_().clamp_(0, 255)

    @staticmethod
    def backward(context: Any, *gradients: Any) -> Any:
        return gradients[0]


def _bilinear(x: Tensor) -> Tensor:
    return (1 - x.abs()).clamp(min=0)


def _bicubic(x: Tensor) -> Tensor:
    a, x = -0.5, x.abs()
    near = ((a + 2) * x - (a + 3)) * x.square() + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return torch.where(x < 1, near, far)


def _lanczos(x: Tensor) -> Tensor:
    return torch.sinc(x) * torch.sinc(x / 3)


def _hamming(x: Tensor) -> Tensor:
    return torch.sinc(x) * (0.54 + 0.46 * torch.cos(math.pi * x))


# By Pillow's number: the kernel, and its support in output pixels.
FILTERS: dict[int, tuple[Callable[[Tensor], Tensor], float]] = {
    LANCZOS: (_lanczos, 3.0),
    BILINEAR: (_bilinear, 1.0),
    BICUBIC: (_bicubic, 2.0),
    HAMMING: (_hamming, 1.0),
}
KNOWN_FILTERS = FILTERS.keys() | {NEAREST, BOX}
