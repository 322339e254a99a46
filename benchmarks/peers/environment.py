"""Environments that pip makes for peers."""

import json
import subprocess
import sys
import venv
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from benchmarks.peers.peer import Peer, PeerError


def install(peer: Peer, cache: Path) -> Path:
    """The Python of the peer's own environment below `cache`, made if it is not there. A peer that
    requires torch gets the version that this environment has.

    Raises:
        PeerError: pip failed.
    """
    if not peer.requirements:
        return Path(sys.executable)
    directory = (cache / peer.name).absolute()
    python, done = directory / "bin" / "python", directory / "requirements.txt"
    same = f"torch=={version('torch').partition('+')[0]}"
    wanted = "\n".join(same if name == "torch" else name for name in peer.requirements)
    if done.is_file() and done.read_text() == wanted:
        return python
    venv.create(directory, clear=True, symlinks=True)
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet"]
    found = subprocess.run([*pip, *wanted.splitlines()], capture_output=True, text=True)
    if found.returncode:
        raise PeerError(f"cannot be installed: {last_error(found.stderr)}")
    done.write_text(wanted)
    return python


def versions(python: Path, packages: Sequence[str]) -> dict[str, str]:
    """Versions of packages that are installed for this Python."""
    code = (
        "import importlib.metadata, json, sys; "
        "print(json.dumps({name: importlib.metadata.version(name) for name in sys.argv[1:]}))"
    )
    found = subprocess.run([python, "-c", code, *packages], capture_output=True, text=True)
    if found.returncode:
        raise PeerError(f"lacks a package: {last_error(found.stderr)}")
    named: dict[str, str] = json.loads(found.stdout)
    return named


def last_error(log: str) -> str:
    """The last line of a log that names an error, or its last line, for a table."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower()]
    return (errors or lines or ["no message"])[-1].replace("|", "/")[:300]
