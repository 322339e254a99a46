"""Decode an image file into a checked RGB array.

The service, `evaluate` and `calibrate` all read images with `decode`, so they see the same pixels:
upright, 16-bit gray scaled down, transparency composited on white as browsers show it. View 0, as
the checkpoint's preprocessing makes it, is taken of all pixels; then large images are scaled down.
A damaged, hostile or absurd file is refused with a typed error. Imports neither torch nor a web
framework, because the service decodes in processes of its own.
"""

import contextlib
import ctypes
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from operator import truediv

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
from models.images.preprocess import Preprocessing, prepare
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
try:
    import pillow_heif
except ImportError:  # the extra `heic` is not installed
    HEIC = False
else:
    HEIC = True
    # Without thumbnails: one of them may show something else, and `draft` would decode it instead.
    pillow_heif.register_heif_opener(
        thumbnails=False, depth_images=False, aux_images=False, decode_threads=1
    )
    FORMATS.append("HEIF")

SUFFIXES = frozenset(
    suffix for suffix, kind in Image.registered_extensions().items() if kind in FORMATS
)
"""Of the names of image files."""

_MODES = {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr"}

_HEIC_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1"}
"""ISO/IEC 23008-12; the last one is of any HEIF."""

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
_TURNED = {_UPRIGHT[value] for value in (5, 6, 7, 8)}
"""Exchange width and height."""

# Pillow's own limit is a process-wide constant; `decode` checks every header itself.
Image.MAX_IMAGE_PIXELS = None
# A decoder process has one image at a time, and may start no threads.
AvifImagePlugin.DEFAULT_MAX_THREADS = 1
Image.init()  # otherwise the first request pays for loading the decoders
with contextlib.suppress(OSError, AttributeError):  # where Pillow's libtiff cannot be reached
    # By itself libtiff writes a line to standard error for each damaged row of a client's file.
    ctypes.CDLL(_imaging.__file__).TIFFSetErrorHandler(None)


@dataclass(frozen=True, slots=True)
class DecodedImage:
    """What is kept of an image file.

    Attributes:
        pixels: uint8 RGB [height, width, 3], within `MAX_SHORT_SIDE` and `MAX_LONG_SIDE`. The
            `view`, if no more was asked for.
        view: view 0 as the checkpoint's preprocessing makes it of all pixels of the image, uint8
            RGB [S, S, 3]; None if no preprocessing was given.
    """

    pixels: NDArray[np.uint8]
    view: NDArray[np.uint8] | None = None


def decode(
    data: bytes,
    max_pixels: int = MAX_PIXELS,
    memory: int | None = None,
    preprocessing: Preprocessing | None = None,
    keep_pixels: bool = True,
) -> DecodedImage:
    """The first frame of an image file, upright.

    Args:
        preprocessing: of the checkpoint that the image is for; without it there is no `view`.
        keep_pixels: return the pixels beside the `view`; if false, `pixels` is the `view`, too. No
            effect without `preprocessing`.
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
            return _read(image, max_pixels, memory, preprocessing, keep_pixels)
    except ImageError:
        raise
    except UnidentifiedImageError:
        if _claims_a_format(data):
            raise DamagedImage("The image is damaged or truncated.") from None
        accepted = ", ".join(FORMATS)
        if data[4:8] == b"ftyp" and data[8:12] in _HEIC_BRANDS:
            raise UnsupportedImage(
                "The image is a HEIC file, which this server reads only with its extra "
                f"`tapt-serve[heic]`; send one of: {accepted}."
            ) from None
        raise UnsupportedImage(f"The image is not one of: {accepted}.") from None
    # Pillow's decoders fail with whatever they trip over: OSError, SyntaxError, ValueError,
    # struct.error, EOFError, OverflowError, zlib.error, IndexError, TypeError and more.
    except Exception as error:
        # Some decoders report that memory ran out in words only.
        if isinstance(error, MemoryError) or "out of memory" in str(error).lower():
            message = "The image needs more memory to decode than one image may take."
            raise OutOfMemory(message) from MemoryError()
        raise DamagedImage("The image is damaged or truncated.") from None


def _read(
    image: Image.Image,
    max_pixels: int,
    memory: int | None,
    preprocessing: Preprocessing | None,
    keep_pixels: bool,
) -> DecodedImage:
    width, height = image.size
    _check_size(image.size, max_pixels)
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ExtremeAspect(
            f"The image is {width}x{height}; its aspect ratio may be at most {MAX_ASPECT}."
        )
    _check_tiles(image, max_pixels)
    scale = min(1.0, MAX_SHORT_SIDE / min(width, height), MAX_LONG_SIDE / max(width, height))
    _halve(image, scale, preprocessing)
    _check_memory(
        _BYTES_PER_PIXEL * image.width * image.height
        + _PROGRESSIVE_BYTES_PER_PIXEL * width * height * ("progressive" in image.info),
        memory,
    )
    declared = image.size
    _load(image)
    if image.size != declared:  # only HEIC's decoder changes its mind
        raise DamagedImage("The image has another size than its header says.")
    upright = _UPRIGHT.get(_orientation(image))
    rgb = _to_rgb(image)
    image.close()  # frees its pixels
    image = rgb if upright is None else rgb.transpose(upright)
    del rgb
    if upright in _TURNED:
        width, height = height, width
    view = None if preprocessing is None else prepare(image, height, width, preprocessing)
    if view is not None and not keep_pixels:
        return DecodedImage(view, view)
    if scale != 1:
        size = max(1, round(width * scale)), max(1, round(height * scale))
        image = image.resize(size, Image.Resampling.LANCZOS, reducing_gap=2.0)
    return DecodedImage(np.array(image, dtype=np.uint8), view)


def _halve(image: Image.Image, scale: float, preprocessing: Preprocessing | None) -> None:
    """Let libjpeg halve a JPEG while decoding, where that leaves twice the size of what is made of
    it. This saves time and moves scores by less than 0.01."""
    if preprocessing is not None:
        if preprocessing.picks_pixels:
            return
        # The image is not upright yet, so its width may be its height.
        for sides in (image.size, image.size[::-1]):
            ratios = map(truediv, preprocessing.resized(*sides), sides)
            scale = max(scale, *ratios)
    if scale <= 1 / 4:
        image.draft(None, ((image.width + 1) // 2, (image.height + 1) // 2))


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
        or (data[4:8] == b"ftyp" and data[8:12] in _HEIC_BRANDS and HEIC)
    )
