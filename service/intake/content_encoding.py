"""Compressed request bodies: gzip, decompressed as it arrives and never beyond the body's limit."""

import asyncio
import zlib
from collections.abc import AsyncGenerator, AsyncIterator

from service.errors import BadRequest, TooLarge, UnsupportedEncoding

PIECE = 2**18
"""Bytes decompressed at once, within a millisecond. A chunk of 64 KiB may hold 64 MiB."""

_GZIP = 16 + zlib.MAX_WBITS


async def decode_content(
    chunks: AsyncIterator[bytes], encoding: str, limit: int
) -> AsyncGenerator[bytes]:
    """The chunks of a body without its `Content-Encoding`.

    The event loop gets a turn after every PIECE. Raises UnsupportedEncoding for anything but gzip
    and identity, TooLarge for more than `limit` bytes before or after decompression, BadRequest for
    damaged data.
    """
    match encoding.strip().lower():
        case "" | "identity":
            decompressor = None
        case "gzip" | "x-gzip":
            decompressor = zlib.decompressobj(_GZIP)
        case _:
            raise UnsupportedEncoding(
                "This Content-Encoding is not supported; send `gzip` or an uncompressed body."
            )
    received = sent = 0
    async for chunk in chunks:
        received += len(chunk)
        if received > limit:
            raise TooLarge(f"The body is larger than {limit} bytes.")
        if decompressor is None:
            yield chunk
            continue
        more = True
        while more:
            piece = _decompress(decompressor, chunk)
            chunk = decompressor.unconsumed_tail
            more = bool(chunk) or len(piece) == PIECE
            sent += len(piece)
            if sent > limit:
                raise TooLarge(f"The decompressed body is larger than {limit} bytes.")
            yield piece
            await asyncio.sleep(0)
    if decompressor is not None and not decompressor.eof:
        raise BadRequest("The gzip body is truncated.")


def _decompress(decompressor: "zlib._Decompress", chunk: bytes) -> bytes:
    try:
        piece = decompressor.decompress(chunk, PIECE)
    except zlib.error:
        raise BadRequest("The body is not valid gzip.") from None
    if decompressor.unused_data:
        raise BadRequest("The gzip body has data after its end.")
    return piece
