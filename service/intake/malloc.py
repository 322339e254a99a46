"""Malloc thresholds that keep freed memory in the process.

By default glibc returns an image's buffers to the system after each request and maps them again,
page fault by page fault, for the next one. On a virtual machine that takes longer than decoding.
"""

import contextlib
import ctypes

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8  # from malloc.h

MMAP_BYTES, TRIM_BYTES = 8 * 2**20, 16 * 2**20
"""Thresholds of a decoder. Larger buffers, those of large photographs, are mapped one by one and go
back to the system at once. Little is kept at the end of the heap: what one decoder keeps comes on
top of what another needs for a large image."""

BODY_BYTES, BODIES_BYTES = 3 * 2**20, 64 * 2**20
"""Thresholds of the API process. It keeps the pixels of common images, but not large bodies: each
of its threads has a heap of its own that would keep some."""


def keep_freed_memory(mmap_bytes: int = MMAP_BYTES, trim_bytes: int = TRIM_BYTES) -> None:
    """Keep the memory of buffers of up to `mmap_bytes`, and `trim_bytes` free at the end of a heap.
    Does nothing without glibc."""
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_MMAP_THRESHOLD, mmap_bytes)
        mallopt(_TRIM_THRESHOLD, trim_bytes)


def use_one_heap() -> None:
    """Let all threads share the main heap. Each would reserve 64 MiB of address space for a heap of
    its own, which a limit on the address space then does not see filled. Does nothing without
    glibc."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_ARENA_MAX, 1)
