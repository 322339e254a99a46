"""Decode an image file into a checked RGB array.

The service, `evaluate` and `calibrate` all read images with `decode`, so they see the same pixels:
upright, 16-bit gray scaled down, transparency composited on white as browsers show it. A damaged,
hostile or absurd file is refused with a typed error. Imports neither torch nor a web framework,
because the service decodes in processes of its own.
"""

import contextlib
import ctypes
from functools import partial
from io import BytesIO

import numpy as np
from numpy.typing import NDArray
from PIL import (
    AvifImagePlugin,
    ExifTags,
    Image,
    ImageChops,
    TiffImagePlugin,
    UnidentifiedImageError,
    WebPImagePlugin,
    _imaging,
    features,
)

from models.errors import (
    DamagedImage,
    ExtremeAspect,
    ImageError,
    OutOfMemory,
    TooManyPixels,
    UnsupportedImage,
)
from models.images.structure import check_structure, read_webp_size

MAX_PIXELS = 40_000_000
"""Width times height that is accepted by default."""

MAX_SHORT_SIDE = 512
"""Pixels. Larger images are scaled down with antialiasing until the shorter side is this long."""

MAX_LONG_SIDE = 4096
"""Pixels. The longer side is at most this long. Images within both bounds are not resized."""

MAX_ASPECT = 50
"""Longer side divided by shorter side; beyond it a center crop shows almost nothing."""

FORMATS = ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"]
if features.check("avif"):
    FORMATS.append("AVIF")

SUFFIXES = frozenset(
    suffix for suffix, kind in Image.registered_extensions().items() if kind in FORMATS
)
"""Of the names of image files."""

_MODES = {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr"}

_TILE_WIDTH, _TILE_LENGTH = 322, 323  # tags of a TIFF

_BYTES_PER_PIXEL = 12
"""Most that decoding takes at once: 40-megapixel files of every format took 5 to 12."""

_PROGRESSIVE_BYTES_PER_PIXEL = 6
"""Coefficients of a progressive JPEG: 2 bytes for each sample, without chroma subsampling."""

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# Pillow's own limit is a process-wide constant; `decode` checks every header itself.
Image.MAX_IMAGE_PIXELS = None
# A decoder process has one image at a time, and may start no threads.
AvifImagePlugin.DEFAULT_MAX_THREADS = 1
Image.init()  # otherwise the first request pays for loading the decoders
with contextlib.suppress(OSError, AttributeError):  # where Pillow's libtiff cannot be reached
    # By itself libtiff writes a line to standard error for each damaged row of a client's file.
    ctypes.CDLL(_imaging.__file__).TIFFSetErrorHandler(None)


def decode(
    data: bytes, max_pixels: int = MAX_PIXELS, memory: int | None = None
) -> NDArray[np.uint8]:
    """The first frame of an image file, upright, as uint8 RGB [height, width, 3].

    Args:
        memory: refuse images that are expected to take more bytes, before any are taken; None
            expects nothing.

    Raises:
        DamagedImage: empty, damaged or truncated.
        UnsupportedImage: not one of `FORMATS`, or samples without a defined range.
        TooManyPixels: more than `max_pixels` by its header.
        ExtremeAspect: sides further apart than `MAX_ASPECT`.
        CostlyImage, OutOfMemory: see there.
    """
    if not data:
        raise DamagedImage("The image is empty.")
    check_structure(data)
    try:
        # libwebp allocates its canvas when the file is opened.
        if size := read_webp_size(data):
            _check_size(size, max_pixels)
            _check_memory(_BYTES_PER_PIXEL * size[0] * size[1], memory)
        with Image.open(BytesIO(data), formats=FORMATS) as image:
            return _read(image, max_pixels, memory)
    except ImageError:
        raise
    except UnidentifiedImageError:
        if _claims_a_format(data):
            raise DamagedImage("The image is damaged or truncated.") from None
        accepted = ", ".join(FORMATS)
        raise UnsupportedImage(f"The image is not one of: {accepted}.") from None
    # Pillow's decoders fail with whatever they trip over: OSError, SyntaxError, ValueError,
    # struct.error, EOFError, OverflowError, zlib.error, IndexError, TypeError and more.
    except Exception as error:
        # Some decoders report that memory ran out in words only.
        if isinstance(error, MemoryError) or "out of memory" in str(error).lower():
            message = "The image needs more memory to decode than one image may take."
            raise OutOfMemory(message) from MemoryError()
        raise DamagedImage("The image is damaged or truncated.") from None


def _read(image: Image.Image, max_pixels: int, memory: int | None) -> NDArray[np.uint8]:
    width, height = image.size
    _check_size(image.size, max_pixels)
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ExtremeAspect(
            f"The image is {width}x{height}; its aspect ratio may be at most {MAX_ASPECT}."
        )
    _check_tiles(image, max_pixels)
    scale = min(1.0, MAX_SHORT_SIDE / min(width, height), MAX_LONG_SIDE / max(width, height))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    if scale < 1:
        # Let libjpeg halve a JPEG while decoding, down to twice the final size. This takes a third
        # of the time and changes the result by less than a quarter of a gray level.
        image.draft(None, (2 * size[0], 2 * size[1]))
    _check_memory(
        _BYTES_PER_PIXEL * image.width * image.height
        + _PROGRESSIVE_BYTES_PER_PIXEL * width * height * ("progressive" in image.info),
        memory,
    )
    _load(image)
    upright = _UPRIGHT.get(_orientation(image))
    image = _to_rgb(image)
    if image.size != size:
        image = image.resize(size, Image.Resampling.LANCZOS, reducing_gap=2.0)
    if upright is not None:
        image = image.transpose(upright)
    return np.array(image, dtype=np.uint8)


def _check_size(size: tuple[int, int], max_pixels: int) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise DamagedImage("The image has no pixels.")
    if width * height > max_pixels:
        raise TooManyPixels(
            f"The image has {width * height} pixels ({width}x{height}); the limit is {max_pixels}."
        )


def _check_memory(expected: int, memory: int | None) -> None:
    if memory is not None and expected > memory:
        raise OutOfMemory(f"The image may take {expected} bytes to decode.")


def _load(image: Image.Image) -> None:
    """Load the pixels. libwebp holds two canvases, which go before Pillow's own copy comes."""
    if isinstance(image, WebPImagePlugin.WebPImageFile):
        image.load_prepare = partial(_free_canvases, image)  # type: ignore[method-assign]
    image.load()


def _free_canvases(image: WebPImagePlugin.WebPImageFile) -> None:
    del image.load_prepare  # a reference to itself, which would keep its memory
    image._decoder = None
    WebPImagePlugin.WebPImageFile.load_prepare(image)


def _check_tiles(image: Image.Image, max_pixels: int) -> None:
    """Check the tiles of a TIFF, which are decoded whole and may be larger than the image."""
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        padded = 1
        for side, tag in zip(image.size, (_TILE_WIDTH, _TILE_LENGTH), strict=True):
            tile = image.tag_v2.get(tag, 1)
            padded *= -(-side // tile) * tile
        if padded > 2 * max_pixels:
            raise TooManyPixels(f"The tiles of the image have {padded} pixels.")


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        # convert("RGB") clips at 255, which makes almost everything white.
        gray = np.rint(np.asarray(image).astype(np.float32) / 257).astype(np.uint8)
        image = Image.fromarray(gray)
    if image.mode not in _MODES:
        raise UnsupportedImage(f"Images of mode {image.mode} are not accepted; send RGB or gray.")
    if not image.has_transparency_data:
        return image.convert("RGB")
    # Image.alpha_composite would hold two more copies of the image.
    alpha = (image if "A" in image.getbands() else image.convert("RGBA")).getchannel("A")
    image.info.pop("transparency", None)  # otherwise the conversion warns
    rgb = image.convert("RGB")
    rgb.paste("white", mask=ImageChops.invert(alpha))
    return rgb


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # broken metadata does not spoil an image; see `decode`
        return 1


def _claims_a_format(data: bytes) -> bool:
    """Whether the file begins like one of an accepted format."""
    return (
        data.startswith(
            (b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"BM", b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
        )
        or (data[:4] == b"RIFF" and data[8:12] == b"WEBP")
        or (data[4:8] == b"ftyp" and b"avi" in data[8:32] and "AVIF" in FORMATS)
    )
