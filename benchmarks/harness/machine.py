"""The machine that a figure was measured on, as pages name it."""

import os
import platform
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from models.evaluation.machine import cpu_name


def load_average() -> float:
    """Processes that ran or waited to run, over the last minute."""
    return os.getloadavg()[0]


def machine() -> str:
    """One sentence: processor, cores, load, Python, day."""
    return (
        f"Machine: {cpu_name()}, {os.cpu_count()} cores, load average {load_average():.1f} at the "
        f"end, Python {platform.python_version()}, {datetime.now(UTC):%Y-%m-%d}."
    )


def hardware(figures: Mapping[str, Any]) -> str:
    """Accelerator or processor, cores and torch, of the `machine` that a run noted."""
    name = figures["accelerator"] or figures["cpu"]
    return f"{name}, {figures['cores']} cores, torch {figures['torch']}"
