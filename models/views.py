"""Random views of images, made on the device from one upload of their uint8 pixels.

View 0 is the image after the checkpoint's own preprocessing, which the decoder has usually made.
The others are random resized crops with flips. A view is two matrix products, one per side, with
Pillow's antialiased resampling weights: no loop over views, and the same pixels as Pillow up to
rounding.
"""

import math
from collections.abc import Callable, Sequence
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
# Images of one size are resampled together, up to this many weights, but at least one image at a
# time. A GPU would wait for many small kernels; a CPU is faster with an image at a time.
WEIGHTS_AT_ONCE = {"cpu": 0, "cuda": 2**25}
ATTEMPTS = 10  # tries for a crop that fits before falling back to the center


def make_views(
    image: NDArray[np.uint8] | Tensor,
    views: int,
    seed: int,
    preprocessing: Preprocessing,
    device: torch.device,
    first: NDArray[np.uint8] | None = None,
) -> Tensor:
    """Views [views, 3, S, S] of one image; arguments as in `make_batch_views`."""
    return make_batch_views([image], views, [seed], preprocessing, device, [first])[0]


def make_batch_views(
    images: Sequence[NDArray[np.uint8] | Tensor],
    views: int,
    seeds: Sequence[int],
    preprocessing: Preprocessing,
    device: torch.device,
    firsts: Sequence[NDArray[np.uint8] | None] | None = None,
) -> Tensor:
    """Views [B, views, 3, S, S] of B images, multiples of 1/255 in [0, 1].

    Args:
        images: uint8 RGB [height, width, 3] of any size; or whole values [3, height, width] in
            [0, 255] as tensors, to which the views pass a gradient: straight through rounding.
        seeds: draw the crops on the host, so that device and batch do not change them.
        firsts: view 0, uint8 RGB [S, S, 3], of each image, where the decoder made it of all pixels
            (see `DecodedImage`); None where it is to be made here.
    """
    groups: dict[tuple[torch.Size, bool, bool], list[int]] = {}
    firsts = firsts or [None] * len(images)
    for row, (image, first) in enumerate(zip(images, firsts, strict=True)):
        sides = image.shape[1:] if isinstance(image, Tensor) else torch.Size(image.shape[:2])
        alike = sides, isinstance(image, Tensor), first is None
        groups.setdefault(alike, []).append(row)
    made, order = list[Tensor](), list[int]()
    for (sides, *_), rows in groups.items():
        weights = views * preprocessing.crop * sum(sides)
        size = max(1, WEIGHTS_AT_ONCE[device.type] // weights)
        for start in range(0, len(rows), size):
            some = rows[start : start + size]
            chosen, drawn = [images[row] for row in some], [seeds[row] for row in some]
            whole = [first for row in some if (first := firsts[row]) is not None]
            made.append(_make_equal(chosen, views, drawn, preprocessing, device, whole))
            order += some
    joined = torch.cat(made)
    if order == sorted(order):
        return joined
    return joined[upload(np.argsort(order), device)]


def _make_equal(
    images: Sequence[NDArray[np.uint8] | Tensor],
    views: int,
    seeds: Sequence[int],
    preprocessing: Preprocessing,
    device: torch.device,
    firsts: Sequence[NDArray[np.uint8]],
) -> Tensor:
    """As `make_batch_views`, for images of one size, all arrays or all tensors; `firsts` has all
    first views or none."""
    whole = (_upload_pixels(firsts, device) / 255).unsqueeze(1) if firsts else None
    if whole is not None and views == 1:
        return whole  # no other pixel is needed
    arrays = [image for image in images if not isinstance(image, Tensor)]
    tensors = [image for image in images if isinstance(image, Tensor)]
    pixels = torch.stack(tensors) if tensors else _upload_pixels(arrays, device)
    if whole is None:
        rows, columns = _whole(pixels, preprocessing)
        shape = len(pixels), 1, -1, -1
        whole = _resample(pixels, rows.expand(*shape), columns.expand(*shape))
    if views == 1:
        return whole
    (height, width), size = pixels.shape[2:], preprocessing.crop
    drawn = [draw_crops(views - 1, seed, height, width, preprocessing.area) for seed in seeds]
    boxes, flips = (np.concatenate(part) for part in zip(*drawn, strict=True))
    top, left, high, wide = upload(boxes.astype(np.float32), device).T
    places = torch.arange(size, device=device)
    rows = _weights(top, high, places, size, height, BILINEAR)
    columns = _weights(left, wide, places, size, width, BILINEAR)
    flipped = upload(flips, device).view(-1, 1, 1)
    columns = torch.where(flipped, columns.flip(1), columns)
    shares = len(pixels), views - 1
    crops = _resample(pixels, rows.unflatten(0, shares), columns.unflatten(0, shares))
    return torch.cat([whole, crops], dim=1)


def _upload_pixels(images: Sequence[NDArray[np.uint8]], device: torch.device) -> Tensor:
    """Images [height, width, 3] as one tensor [B, 3, height, width] in [0, 255]."""
    return upload(np.stack(images), device).permute(0, 3, 1, 2).float()


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
    """Weights [S, height] and [S, width] of the resize followed by the center crop, for images
    [B, 3, height, width]."""
    weights = []
    sides = pixels.shape[2:]
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
    """Views [B, n, 3, S, S] in [0, 1] of images [B, 3, height, width] in [0, 255], by weights
    [B, n, S, height] and [B, n, S, width].

    Each pass rounds to whole values as Pillow does, so that a view is what a file would hold.
    """
    batch, count, size, _ = rows.shape
    channels, height, width = pixels.shape[1:]
    wide = pixels.reshape(batch, -1, width) @ columns.flatten(1, 2).transpose(1, 2)
    wide = round_levels(wide).view(batch, channels, height, count, size)
    views = round_levels(rows @ wide.permute(0, 3, 2, 1, 4).flatten(3))
    return views.view(batch, count, size, channels, size).transpose(2, 3) / 255


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
