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
"""mmap threshold: larger buffers, those of large photographs, are mapped individually."""


def keep_freed_memory() -> None:
    """Keep the memory that decoding common images takes. Does nothing without glibc."""
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_MMAP_THRESHOLD, MMAP_BYTES)
        mallopt(_TRIM_THRESHOLD, TRIM_BYTES)
