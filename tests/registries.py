"""Releases that tests need beside the environment, from PyPI and npm by their ordinary clients."""

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

CACHE = Path(__file__).parent.parent / ".cache" / "clients"


def fetch(name: str, install: Callable[[Path], list[str]]) -> Path:
    """The folder of a release, installed on first use; skips the test when it cannot be."""
    folder = CACHE / name
    if folder.exists():
        return folder
    CACHE.mkdir(parents=True, exist_ok=True)
    (CACHE.parent / ".gitignore").write_text("*\n")
    unfinished = CACHE / f"{name}.{os.getpid()}"
    unfinished.mkdir()
    done = subprocess.run(install(unfinished), capture_output=True, text=True)
    if done.returncode:
        shutil.rmtree(unfinished)
        reason = (done.stderr.strip() or done.stdout.strip() or "no reason given").splitlines()[-1]
        pytest.skip(f"{name} cannot be installed here: {reason}")
    unfinished.rename(folder)
    return folder
