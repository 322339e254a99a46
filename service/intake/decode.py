"""Decode an image file, as bytes or base64, to an RGB array.

No later stage reads files, so damaged and hostile ones are refused here, each with an error of its
own. Alpha is dropped and not composited, as in transformers' pipelines (`convert("RGB")`), so that
equal images get equal answers.
"""

import base64
import binascii
import contextlib
import ctypes
import threading
from contextlib import AbstractContextManager
from io import BytesIO

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, TiffImagePlugin, UnidentifiedImageError, _imaging, features

from service.errors import BadRequest, ServiceError, TooLarge, Unprocessable, UnsupportedImage
from service.intake.structure import check_structure

MAX_SHORT_SIDE = 512
"""Pixels. Larger images are scaled down with antialiasing until the shorter side is this long."""

MAX_LONG_SIDE = 4096
"""Pixels. The longer side is at most this long. Images within both bounds are not resized."""

MAX_ASPECT = 50
"""Longer side divided by shorter side; beyond it a center crop shows almost nothing."""

FORMATS = ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"]
if features.check("avif"):
    FORMATS.append("AVIF")

_MODES = {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr"}

_AVIF = threading.Lock()

_TILE_WIDTH, _TILE_LENGTH = 322, 323  # tags of a TIFF

_STANDARD_ALPHABET = bytes.maketrans(b"-_", b"+/")

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
Image.init()  # load the decoders now and not with the first request
with contextlib.suppress(OSError, AttributeError):  # Pillow does not always export libtiff
    # libtiff writes a line to standard error for each damaged row of a client's file.
    ctypes.CDLL(_imaging.__file__).TIFFSetErrorHandler(None)


def decode(data: bytes, max_pixels: int) -> NDArray[np.uint8]:
    """Decode the first frame of an image file, upright, to uint8 RGB [height, width, 3].

    Raises:
        BadRequest: the file is empty, damaged or truncated.
        UnsupportedImage: it is in none of `FORMATS`, or its samples have no defined range.
        TooLarge: its header names more than `max_pixels`, or it does not fit into memory.
        Unprocessable: its aspect ratio is above `MAX_ASPECT`.
    """
    if not data:
        raise BadRequest("The image is empty.")
    check_structure(data)
    try:
        with _avif_lock(data), Image.open(BytesIO(data), formats=FORMATS) as image:
            return _read(image, max_pixels)
    except ServiceError:
        raise
    except MemoryError:
        raise TooLarge("Decoding the image needs more memory than there is.") from None
    except UnidentifiedImageError:
        if _claims_a_format(data):
            raise BadRequest("The image is damaged or truncated.") from None
        accepted = ", ".join(FORMATS)
        raise UnsupportedImage(f"The image is not one of: {accepted}.") from None
    # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error, EOFError,
    # OverflowError, zlib.error, IndexError, TypeError and more.
    except Exception:
        raise BadRequest("The image is damaged or truncated.") from None


def from_base64(text: str) -> bytes:
    """Decode base64, standard or URL-safe, padded or not, or a `data:` URI of it.

    Raises BadRequest; Unprocessable for a URL, because the caller accepts none.
    """
    head = text[:64].lstrip().lower()
    if head.startswith(("http://", "https://")):
        raise Unprocessable("Images are not accepted by URL here; send the file as base64.")
    if head.startswith("data:"):
        media_type, comma, text = text.partition(",")
        if not comma or not media_type.rstrip().lower().endswith(";base64"):
            raise BadRequest("The data URI of the image is not base64.")
    with contextlib.suppress(ValueError):
        return binascii.a2b_base64(text, strict_mode=True)  # the usual form, and the fastest
    try:
        # One pass over many megabytes: to the standard alphabet, without white space.
        code = text.encode("ascii").translate(_STANDARD_ALPHABET, b" \t\r\n\v\f").rstrip(b"=")
        return base64.b64decode(code + b"=" * (-len(code) % 4), validate=True)
    except ValueError:  # binascii.Error and UnicodeEncodeError are subclasses
        raise BadRequest("The image is not base64.") from None


def _read(image: Image.Image, max_pixels: int) -> NDArray[np.uint8]:
    width, height = image.size
    if width < 1 or height < 1:
        raise BadRequest("The image has no pixels.")
    if width * height > max_pixels:
        raise TooLarge(
            f"The image has {width * height} pixels ({width}x{height}); the limit is {max_pixels}."
        )
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise Unprocessable(
            f"The image is {width}x{height}; its aspect ratio may be at most {MAX_ASPECT}."
        )
    _check_tiles(image, max_pixels)
    scale = min(1.0, MAX_SHORT_SIDE / min(width, height), MAX_LONG_SIDE / max(width, height))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    if scale < 1:
        # Let libjpeg halve a JPEG while decoding, down to twice the final size. This takes a third
        # of the time and changes the result by less than a quarter of a gray level.
        image.draft(None, (2 * size[0], 2 * size[1]))
    image.load()
    upright = _UPRIGHT.get(_orientation(image))
    image = _to_rgb(image)
    if image.size != size:
        image = image.resize(size, Image.Resampling.LANCZOS, reducing_gap=2.0)
    if upright is not None:
        image = image.transpose(upright)
    return np.array(image, dtype=np.uint8)


def _check_tiles(image: Image.Image, max_pixels: int) -> None:
    """Check the tiles of a TIFF, which are decoded whole and may be larger than the image."""
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        padded = 1
        for side, tag in zip(image.size, (_TILE_WIDTH, _TILE_LENGTH), strict=True):
            tile = image.tag_v2.get(tag, 1)
            padded *= -(-side // tile) * tile
        if padded > 2 * max_pixels:
            raise TooLarge(f"The tiles of the image have {padded} pixels.")


def _avif_lock(data: bytes) -> AbstractContextManager[object]:
    """A lock for AVIF files, and nothing for others. An AVIF frame may be larger than its header
    says, up to the decoder's limit of 16384 x 16384, so only one is decoded at a time."""
    return _AVIF if data[4:8] == b"ftyp" else contextlib.nullcontext()


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        # convert("RGB") clips at 255, which makes almost everything white.
        gray = np.rint(np.asarray(image).astype(np.float32) / 257).astype(np.uint8)
        image = Image.fromarray(gray)
    if image.mode not in _MODES:
        raise UnsupportedImage(f"Images of mode {image.mode} are not accepted; send RGB or gray.")
    if image.mode in {"P", "PA"} and "transparency" in image.info:
        image = image.convert("RGBA")  # avoids a warning; the colors are the same
    return image.convert("RGB")


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
