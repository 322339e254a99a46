"""What an image file holds besides its pixels, bounded before a decoder walks through it.

A header limits the pixels but not the work: sixteen megabytes hold a million empty JPEG scans, each
a pass over all pixels, or ten thousand colour profiles, each a megabyte once it is inflated. The
structure of a file is cheap to walk, and no honest file comes near these bounds. Only the formats
whose structure costs a decoder more than its bytes are walked; a file that loses its structure is
left to the decoder, which refuses it.
"""

import re

from service.errors import BadRequest

MAX_SEGMENTS = 512
"""Segments, chunks or extensions that hold no pixels; 64 KiB each, a JPEG has 256 in 16 MiB."""

MAX_SCANS = 100
"""Scans of a progressive JPEG; common encoders write ten."""

MAX_PIECES = 2**17
"""PNG chunks of pixels, or GIF sub-blocks before the first frame."""

MAX_SLACK = 2**16
"""Bytes between segments that belong to none."""

_MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd8\xff]", re.DOTALL)  # one that begins a segment
_SCAN, _END = 0xDA, 0xD9
_PIXELS = {b"IDAT", b"fdAT", b"fcTL"}


def check_structure(data: bytes) -> None:
    """Raises BadRequest for a JPEG, PNG or GIF file past one of the bounds."""
    if data.startswith(b"\xff\xd8"):
        _walk_jpeg(data)
    elif data.startswith(b"\x89PNG"):
        _walk_png(data)
    elif data.startswith(b"GIF8"):
        _walk_gif(data)


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


def _bound(count: int, limit: int, what: str) -> None:
    if count > limit:
        raise BadRequest(f"The image is malformed: it has more than {limit} {what}.")
