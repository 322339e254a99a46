"""Image files that cost a decoder far more than their size: valid, nearly valid, or absurd.

Each is built from its format's specification, and fits into a request.
"""

import random
from collections.abc import Callable

from benchmarks.bombs import containers, streams
from benchmarks.bombs.build import MAX_BYTES, Bombs

_BOMBS: dict[str, Callable[[], Bombs]] = {
    "JPEG": streams.jpeg_bombs,
    "PNG": streams.png_bombs,
    "GIF": streams.gif_bombs,
    "BMP": streams.bmp_bombs,
    "TIFF": containers.tiff_bombs,
    "WEBP": containers.webp_bombs,
    "AVIF": containers.avif_bombs,
    "HEIF": containers.heif_bombs,
}


def bombs(kind: str) -> Bombs:
    """Names and files of one format, the expensive ones of it."""
    for name, file in _BOMBS[kind]():
        assert len(file) <= MAX_BYTES, (kind, name, len(file))
        yield name, file


def variants(file: bytes, mutate: Callable[[bytes, random.Random], bytes], seed: int) -> Bombs:
    """A file cut short, and damaged at its head, where the structure is."""
    draw = random.Random(seed)
    yield "cut in half", file[: len(file) // 2]
    yield "without its end", file[:-16]
    head = min(len(file), 512)
    for number in range(2):
        yield f"damaged {number}", mutate(file[:head], draw) + file[head:]
