"""Memory that the next image wants is kept, and the rest is returned."""

import platform
import subprocess
import sys

import pytest


def measure(script: str, how: str) -> int:
    """What a script prints in a process of its own."""
    return int(subprocess.check_output([sys.executable, "-c", script, how], text=True))


FAULTS = """
import io, resource, sys
import numpy as np
from PIL import Image
from service.malloc import keep_freed_memory
from service.intake.decode import decode

if sys.argv[1] == "keep":
    keep_freed_memory()
file = io.BytesIO()
pixels = np.random.default_rng(0).integers(0, 256, (480, 640, 3), dtype=np.uint8)
Image.fromarray(pixels).save(file, "JPEG")
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    decode(file.getvalue(), 10**6)
before = faults()
for _ in range(20):
    decode(file.getvalue(), 10**6)
print(faults() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_decoding_reuses_its_buffers() -> None:
    usual, kept = (measure(FAULTS, how) for how in ("usual", "keep"))
    assert kept < usual / 4


BODIES = """
import sys, threading
from service.malloc import BODIES_BYTES, BODY_BYTES, MMAP_BYTES, keep_freed_memory

keep_freed_memory(BODY_BYTES if sys.argv[1] == "bodies" else MMAP_BYTES, BODIES_BYTES)
size = 7 * 2**20

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

def hold(barrier):
    buffers = [bytearray(b"x" * size) for _ in range(3)]
    barrier.wait()
    del buffers[:]
    barrier.wait()
    barrier.wait()

before = resident()
barrier = threading.Barrier(5)
for _ in range(4):
    threading.Thread(target=hold, args=(barrier,), daemon=True).start()
barrier.wait()
barrier.wait()
print(resident() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_the_bodies_that_threads_parsed_are_not_kept() -> None:
    images, bodies = (measure(BODIES, how) for how in ("images", "bodies"))
    assert bodies < 8 * 2**20 < 32 * 2**20 < images


THREADS = """
import sys, threading
from service.malloc import use_one_heap

if sys.argv[1] == "one":
    use_one_heap()
size = lambda: int(open("/proc/self/statm").read().split()[0]) * 4096
barrier = threading.Barrier(5)

def allocate():
    held = [bytes(1000 + number) for number in range(1000)]
    barrier.wait()
    barrier.wait()

before = size()
for _ in range(4):
    threading.Thread(target=allocate, daemon=True).start()
barrier.wait()
print(size() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_threads_reserve_no_heap_of_their_own() -> None:
    """They reserve their stacks alone, of 8 MiB each."""
    many, one = (measure(THREADS, how) for how in ("many", "one"))
    assert one < 4 * 2**24 < 4 * 2**26 < many


FRAGMENTS = """
import ctypes, sys, time
from service.malloc import trim_regularly

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

before = resident()
blocks = [libc.malloc(2**16) for _ in range(1024)]
for block in blocks:
    ctypes.memset(block, 1, 2**16)
for number, block in enumerate(blocks):
    if number % 16 != 15:  # the last of them holds on to the whole heap
        libc.free(block)
if sys.argv[1] == "trim":
    trim_regularly(0.01)
    deadline = time.monotonic() + 10
    while resident() - before > 2**25 and time.monotonic() < deadline:
        time.sleep(0.01)
print(resident() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_free_memory_between_used_blocks_goes_back_to_the_system() -> None:
    usual, trimmed = (measure(FRAGMENTS, how) for how in ("usual", "trim"))
    assert trimmed < 2**24 < 2**25 < usual
