"""How long this process keeps memory that it will want again in a moment.

By itself glibc gives the buffers of an image back to the system with every request and fetches them
anew for the next, page by page, each page a fault; on a virtual machine that takes longer than the
decoding itself.
"""

import contextlib
import ctypes

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # names of malloc.h

KEPT = 64 * 2**20
"""Bytes at the end of a heap, of which threads share a few, that are not given back."""

APART = 8 * 2**20
"""Bytes from which on a buffer is fetched and given back by itself: those of large photographs."""


def keep_freed_memory() -> None:
    """Keep what small photographs need. Does nothing where the C library is not glibc."""
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_MMAP_THRESHOLD, APART)
        mallopt(_TRIM_THRESHOLD, KEPT)
