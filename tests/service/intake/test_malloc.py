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
