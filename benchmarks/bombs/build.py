"""What the files are built with."""

import io
from collections.abc import Iterator

from PIL import Image

MAX_BYTES = 16 * 2**20 - 2048  # of a file in a form of `max_body_bytes`
SIDE = 6324  # its square is just below `max_image_pixels`

Bombs = Iterator[tuple[str, bytes]]


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def repeat(part: bytes, size: int = MAX_BYTES // 2) -> bytes:
    return part * (size // len(part))
