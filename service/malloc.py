"""What glibc does with freed memory: keep it for the next request, and return it in time.

By default glibc returns an image's buffers to the system after each request and maps them again,
page fault by page fault, for the next one. On a virtual machine that takes longer than decoding.
What is kept so, the free pages between blocks in use, must still go back after a busy time.
"""

import contextlib
import ctypes
import threading
import time
from collections.abc import Callable

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


def trim_regularly(seconds: float = 60.0) -> None:
    """Return free pages inside the heaps to the system from time to time, in a thread of its own.
    Does nothing without glibc."""
    with contextlib.suppress(OSError, AttributeError):
        trim = ctypes.CDLL(None).malloc_trim
        threading.Thread(target=_trim, args=(trim, seconds), daemon=True).start()


def _trim(trim: Callable[[int], int], seconds: float) -> None:
    while True:
        time.sleep(seconds)
        trim(0)  # without the GIL
