"""Memory that the next image wants is kept."""

import platform
import subprocess
import sys

import pytest

FAULTS = """
import io, resource, sys
import numpy as np
from PIL import Image
from service.intake.malloc import keep_freed_memory
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
    usual, kept = (
        int(subprocess.check_output([sys.executable, "-c", FAULTS, how], text=True))
        for how in ("usual", "keep")
    )
    assert kept < usual / 4


BODIES = """
import sys, threading
from service.intake.malloc import BODIES_BYTES, BODY_BYTES, MMAP_BYTES, keep_freed_memory

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
    images, bodies = (
        int(subprocess.check_output([sys.executable, "-c", BODIES, how], text=True))
        for how in ("images", "bodies")
    )
    assert bodies < 8 * 2**20 < 32 * 2**20 < images


THREADS = """
import sys, threading
from service.intake.malloc import use_one_heap

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
    many, one = (
        int(subprocess.check_output([sys.executable, "-c", THREADS, how], text=True))
        for how in ("many", "one")
    )
    assert one < 4 * 2**24 < 4 * 2**26 < many
