"""Decode an image of a request, from bytes or base64, with the service's errors."""

import base64
import binascii
import contextlib

from models import errors
from models.images.decode import DecodedImage
from models.images.decode import decode as decode_image
from models.images.preprocess import Preprocessing
from service.errors import (
    BadRequest,
    ImageTooCostly,
    ServiceError,
    TooLarge,
    Unprocessable,
    UnsupportedImage,
)

_STANDARD_ALPHABET = bytes.maketrans(b"-_", b"+/")


class OutOfMemory(ImageTooCostly):
    """As `models.errors.OutOfMemory`."""


ERRORS: dict[type[errors.ImageError], type[ServiceError]] = {
    errors.DamagedImage: BadRequest,
    errors.UnsupportedImage: UnsupportedImage,
    errors.TooManyPixels: TooLarge,
    errors.ExtremeAspect: Unprocessable,
    errors.CostlyImage: ImageTooCostly,
    errors.OutOfMemory: OutOfMemory,
}


def decode(
    data: bytes,
    max_pixels: int,
    memory: int | None = None,
    preprocessing: Preprocessing | None = None,
    keep_pixels: bool = True,
) -> DecodedImage:
    """As `models.images.decode.decode`.

    Raises BadRequest, UnsupportedImage, TooLarge, Unprocessable, ImageTooCostly or OutOfMemory, in
    the order of the errors there.
    """
    try:
        return decode_image(data, max_pixels, memory, preprocessing, keep_pixels)
    except errors.ImageError as error:
        raise ERRORS[type(error)](str(error)) from error.__cause__


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
