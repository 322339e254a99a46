"""A checkpoint's preprocessing of images, and its resize and center crop in Pillow.

Imports no torch: decoder processes make view 0 of every image with it.
"""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from PIL import Image

AREA = (0.08, 1.0)  # of random crops, as published
NEAREST, LANCZOS, BILINEAR, BICUBIC, BOX, HAMMING = range(6)  # Pillow's numbers of filters


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """A checkpoint's preprocessing of images, and the size of random crops.

    Attributes:
        crop: side of the center crop, padded with black where the image is smaller.
        short_side: resize the shorter side to this; None for `size`.
        size: resize to this (height, width); None for `within`.
        resample: Pillow's filter number.
        mean, std: normalize the channels.
        area: smallest and largest share of the image that a random crop shows, in (0, 1].
        long_side: most that the longer side may become with `short_side`; the shorter one becomes
            shorter where it would exceed this.
        within: resize to the largest (height, width) within these, keeping the aspect ratio; None
            to keep the size.
    """

    crop: int
    short_side: int | None
    size: tuple[int, int] | None
    resample: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    area: tuple[float, float] = AREA
    long_side: int | None = None
    within: tuple[int, int] | None = None

    @property
    def picks_pixels(self) -> bool:
        """Whether single pixels of an image decide: a decoder may not average them before."""
        keeps_size = self.short_side is None and self.size is None and self.within is None
        return keeps_size or self.resample in (NEAREST, BOX)

    def without_resize(self) -> "Preprocessing":
        """The same for images that keep their size."""
        return replace(self, short_side=None, long_side=None, size=None, within=None)

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of an image after the resize, at least 1.

        The arithmetic and its rounding are those of transformers (`get_resize_output_image_size`,
        `get_size_with_aspect_ratio` and `get_image_size_for_max_height_width`).
        """
        short, long = sorted((height, width))
        if self.short_side is not None:
            target: float = self.short_side
            if self.long_side is not None and long / short * target > self.long_side:
                target = self.long_side * float(short) / long
                if round(target) == short:
                    return height, width
                shorter = round(target)
            else:
                shorter = self.short_side
            longer = int(target * long / short)
            found = (shorter, longer) if height <= width else (longer, shorter)
        elif self.within is not None:
            scale = min(self.within[0] / height, self.within[1] / width)
            found = int(height * scale), int(width * scale)
        else:
            found = self.size or (height, width)
        return max(1, found[0]), max(1, found[1])


def prepare(
    image: Image.Image, height: int, width: int, preprocessing: Preprocessing
) -> NDArray[np.uint8]:
    """An upright RGB image after the resize and the center crop, uint8 RGB [S, S, 3].

    Args:
        height, width: of the image in its file, which may have been halved while decoding.
    """
    height, width = preprocessing.resized(height, width)
    if (width, height) != image.size:
        image = image.resize((width, height), preprocessing.resample)
    side = preprocessing.crop
    left, top = (width - side) // 2, (height - side) // 2
    # Beyond its borders the image is black.
    return np.array(image.crop((left, top, left + side, top + side)), dtype=np.uint8)
