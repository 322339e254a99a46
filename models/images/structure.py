"""Bound what an image file holds besides its pixels, before a decoder walks through it.

A header limits the pixels but not the work: sixteen megabytes hold a million empty JPEG scans, each
a pass over all pixels, or four million TIFF strips of one byte, each a Python object. Walking the
structure of a file is cheap, and no honest file comes near these bounds. Only what costs a decoder
more than its bytes is walked; a file that loses its structure is left to the decoder, which refuses
it.
"""

import re
from collections.abc import Iterator
from typing import Literal

from models.errors import CostlyImage, DamagedImage, UnsupportedImage

MAX_SEGMENTS = 512
"""Segments, chunks or extensions that hold no pixels; 64 KiB each, a JPEG has 256 in 16 MiB."""

MAX_SCANS = 100
"""Scans of a progressive JPEG; common encoders write ten."""

MAX_PIECES = 2**17
"""PNG or WebP chunks of pixels, or GIF sub-blocks before the first frame."""

MAX_SLACK = 2**16
"""Bytes between segments that belong to none."""

MAX_STRIPS = 2**16
"""Strips or tiles of a TIFF; Pillow keeps a Python object for each. 40 megapixels are 610 tiles of
256 x 256, or at most 44,721 strips of one row within the aspect ratio that `decode` accepts."""

MAX_ENTRIES = 1024
"""Entries of a TIFF directory; common encoders write about 20."""

MAX_ITEMS = 4096
"""Items, properties or frames of an AVIF, each of which libavif searches in a list of all."""

MAX_REFERENCES = 2**14
"""Bytes of references between the items of an AVIF. An item can be named there alone."""

MAX_RLE_PIXELS = 2**21
"""Pixels of a run-length encoded BMP, which Pillow decodes in Python."""

_MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd8\xff]", re.DOTALL)  # one that begins a segment
_SCAN, _END = 0xDA, 0xD9
_ARITHMETIC = {0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF}  # frames of ITU-T T.81, Table B.1
_PIXELS = {b"IDAT", b"fdAT", b"fcTL"}
_TIFF_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 16: 8}
_STRIP_TAGS = {273, 279, 324, 325}  # offsets and byte counts of strips and tiles
_CONTAINERS = {b"meta": 4} | dict.fromkeys(
    (b"iprp", b"ipco", b"moov", b"trak", b"mdia", b"minf", b"stbl"), 0
)
"""Boxes of ISO/IEC 14496-12 that hold boxes, with the bytes that come before these."""

_TABLES = {b"iinf": 4, b"iloc": 6, b"ipma": 4, b"stsz": 8} | dict.fromkeys(
    (b"stts", b"stsc", b"stco", b"co64", b"stss"), 4
)
"""Boxes that hold a number of entries, with its place in the body."""


def check_structure(data: bytes) -> None:
    """Check a file of any format.

    Raises:
        DamagedImage: it is past one of the bounds.
        UnsupportedImage: it is an arithmetic-coded JPEG.
        CostlyImage: it is a large run-length encoded BMP.
    """
    if data.startswith(b"\xff\xd8"):
        _walk_jpeg(data)
    elif data.startswith(b"\x89PNG"):
        _walk_png(data)
    elif data.startswith(b"GIF8"):
        _walk_gif(data)
    elif data.startswith((b"II", b"MM")):
        _walk_tiff(data)
    elif data.startswith(b"BM"):
        _check_bmp(data)
    elif data[4:8] == b"ftyp":
        _walk_avif(data)
    elif data[:4] == b"RIFF":
        _walk_webp(data)


def read_webp_size(data: bytes) -> tuple[int, int] | None:
    """Width and height of a WebP's canvas; None for any other file."""
    if data[:4] != b"RIFF" or data[8:12] != b"WEBP":
        return None
    match data[12:16]:
        case b"VP8X":
            return 1 + _little(data[24:27]), 1 + _little(data[27:30])
        case b"VP8L":
            bits = _little(data[21:25])
            return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
        case b"VP8 ":
            return _little(data[26:28]) & 0x3FFF, _little(data[28:30]) & 0x3FFF
    return None


def _walk_jpeg(data: bytes) -> None:
    at, segments, scans, slack = 2, 0, 0, 0
    while found := _MARKER.search(data, at):
        marker = data[found.end() - 1]
        # Once a scan began, what lies between segments is its pixels.
        slack += 0 if scans else found.start() - at
        if marker == _END:
            if scans:
                return
            at, slack = found.end(), slack + 2
            continue
        if marker in _ARITHMETIC and not scans:
            # Its decoder goes on at full cost when the data has ended; hardly anyone writes it.
            raise UnsupportedImage("JPEGs with arithmetic coding are not accepted.")
        segments += 1
        scans += marker == _SCAN
        _bound(segments - scans, MAX_SEGMENTS, "segments")
        _bound(scans, MAX_SCANS, "scans")
        _bound(slack, MAX_SLACK, "bytes between its segments")
        at = found.end() + max(2, int.from_bytes(data[found.end() : found.end() + 2]))
    _bound(0 if scans else len(data) - at, MAX_SLACK, "bytes between its segments")


def _walk_png(data: bytes) -> None:
    at, segments, pieces, profiles = 8, 0, 0, 0
    while at + 12 <= len(data):
        kind = data[at + 4 : at + 8]
        if kind == b"IEND":
            return
        if kind in _PIXELS:
            pieces += 1
        else:
            segments += 1
        profiles += kind == b"iCCP"
        _bound(segments, MAX_SEGMENTS, "chunks")
        _bound(pieces, MAX_PIECES, "chunks")
        _bound(profiles, 1, "colour profiles")
        at += 12 + int.from_bytes(data[at : at + 4])


def _walk_gif(data: bytes) -> None:
    at, segments, pieces, slack = 13, 0, 0, 0
    if len(data) > 10 and data[10] & 0x80:
        at += 6 << (data[10] & 7)  # the palette
    while at < len(data):
        match data[at]:
            case 0x21:
                segments += 1
                comment = data[at + 1 : at + 2] == b"\xfe"
                at += 2
                # As Pillow reads it: an empty first block ends a comment, but nothing else.
                first = True
                while at < len(data) and (data[at] or (first and not comment)):
                    pieces += 1
                    _bound(pieces, MAX_PIECES, "sub-blocks")
                    at += 1 + data[at]
                    first = False
            case 0x2C | 0x3B:  # the first frame, or the end
                return
            case _:
                slack += 1
        at += 1
        _bound(segments, MAX_SEGMENTS, "extensions")
        _bound(slack, MAX_SLACK, "bytes between its blocks")


def _walk_tiff(data: bytes) -> None:
    order: Literal["little", "big"] = "little" if data[:2] == b"II" else "big"

    def number(at: int, size: int) -> int:
        return int.from_bytes(data[at : at + size], order)

    # A classic TIFF counts with 4 bytes, a BigTIFF with 8.
    word = 8 if number(2, 2) == 43 else 4
    start = number(word, word)
    digits = 2 if word == 4 else 8
    entries = number(start, digits)
    _bound(entries, MAX_ENTRIES, "directory entries")
    held = 0
    for at in range(start + digits, start + digits + entries * (4 + 2 * word), 4 + 2 * word):
        count = number(at + 4, word)
        if number(at, 2) in _STRIP_TAGS:
            _bound(count, MAX_STRIPS, "strips or tiles")
        held += count * _TIFF_SIZES.get(number(at + 2, 2), 0)
    # Entries may name the same bytes, over and over.
    _bound(held, max(len(data), MAX_SLACK), "bytes in its directory")


def _check_bmp(data: bytes) -> None:
    width, height = (abs(_signed(data[at : at + 4])) for at in (18, 22))
    # The older header of 12 bytes knows no compression.
    packed = _little(data[14:18]) > 12 and _little(data[30:34]) in (1, 2)
    if packed and width * height > MAX_RLE_PIXELS:
        raise CostlyImage(
            f"The image is a run-length encoded BMP of {width * height} pixels; the limit for "
            f"these is {MAX_RLE_PIXELS}."
        )


def _walk_webp(data: bytes) -> None:
    at, pieces = 12, 0
    while at + 8 <= len(data):
        pieces += 1
        _bound(pieces, MAX_PIECES, "chunks")
        size = _little(data[at + 4 : at + 8])
        at += 8 + size + size % 2


def _walk_avif(data: bytes) -> None:
    for boxes, (kind, start, end) in enumerate(_boxes(data)):
        _bound(boxes, 2 * MAX_ITEMS, "boxes")
        if kind == b"iref":
            _bound(end - start, MAX_REFERENCES, "bytes of references")
        elif (at := _TABLES.get(kind)) is not None:
            # Item counts have 2 bytes in the first versions of their boxes.
            short = data[start : start + 1] < {b"iinf": b"\1", b"iloc": b"\2"}.get(kind, b"\0")
            at += start
            count = int.from_bytes(data[at : at + (2 if short else 4)])
            _bound(count, MAX_ITEMS, "items or frames")


def _boxes(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Type of each box in the file, with the start and the end of its body."""
    pending = [(0, len(data))]
    while pending:
        at, end = pending.pop()
        while at + 8 <= end:
            size, start = int.from_bytes(data[at : at + 4]), at + 8
            if size == 1:
                size, start = int.from_bytes(data[start : start + 8]), at + 16
            close = min(at + size, end) if size else end
            if close < start:
                break
            kind = data[at + 4 : at + 8]
            yield kind, start, close
            if kind in _CONTAINERS:
                pending.append((start + _CONTAINERS[kind], close))
            at = close


def _little(field: bytes) -> int:
    return int.from_bytes(field, "little")


def _signed(field: bytes) -> int:
    return int.from_bytes(field, "little", signed=True)


def _bound(count: int, limit: int, what: str) -> None:
    if count > limit:
        raise DamagedImage(f"The image is malformed: it has more than {limit} {what}.")
