"""The processor that figures are measured on."""

import platform
from pathlib import Path


def cpu_name() -> str:
    """The model name of the processor, or its architecture where the system names no model."""
    listed = Path("/proc/cpuinfo")
    lines = listed.read_text().splitlines() if listed.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()
