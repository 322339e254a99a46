"""Malloc thresholds that keep freed memory in the process.

By default glibc returns an image's buffers to the system after each request and maps them again,
page fault by page fault, for the next one. On a virtual machine that takes longer than decoding.
"""

import contextlib
import ctypes

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # from malloc.h

TRIM_BYTES = 64 * 2**20
"""Free memory at the end of a heap that is kept. Threads share a few heaps."""

MMAP_BYTES = 8 * 2**20
"""mmap threshold of a decoder: larger buffers, those of large photographs, are mapped one by one,
and go back to the system at once."""

BODY_BYTES = 3 * 2**20
"""mmap threshold of the API process. It keeps the pixels of common images, but not large bodies:
each of its threads has a heap of its own that would keep some."""


def keep_freed_memory(mmap_bytes: int = MMAP_BYTES) -> None:
    """Keep the memory of buffers up to so many bytes. Does nothing without glibc."""
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_MMAP_THRESHOLD, mmap_bytes)
        mallopt(_TRIM_THRESHOLD, TRIM_BYTES)
