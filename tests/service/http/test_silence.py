"""No telemetry: the whole service, as started, speaks to nobody but its clients."""

import base64
import os
import re
import subprocess
import sys
from pathlib import Path

import httpx

from tests import tiny

HOOK = """
import os, sys

def hear(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.sendto", "socket.gethostbyname"):
        with open(os.environ["HEARD"], "a") as heard:
            heard.write(f"{os.getpid()} {event} {arguments[-1 if 'connect' in event else 0]!r}\\n")

sys.addaudithook(hear)
with open(os.environ["HEARD"], "a") as heard:
    heard.write(f"{os.getpid()} listening\\n")
"""


def listen(directory: Path, *command: str) -> tuple[subprocess.Popen[str], Path]:
    """Start a Python that notes down, as do its children, whom it calls."""
    (directory / "sitecustomize.py").write_text(HOOK)
    heard = directory / "heard"
    path = os.pathsep.join([str(directory), str(Path(__file__).parents[3])])
    hushed = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environ = hushed | {"PYTHONPATH": path, "HEARD": str(heard)}
    started = subprocess.Popen(
        [sys.executable, *command], env=environ, stdout=subprocess.PIPE, text=True
    )
    return started, heard


def test_the_listener_hears(tmp_path: Path) -> None:
    code = (
        "import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM).connect(('192.0.2.1', 9))"
    )
    started, heard = listen(tmp_path, "-c", code)
    with started:
        assert started.wait(60) == 0
    assert "socket.connect ('192.0.2.1', 9)" in heard.read_text()


def test_a_running_service_calls_nobody(tmp_path: Path, photo: bytes) -> None:
    model = tiny.save_checkpoint(tmp_path / "model")
    knobs = ["--port", "0", "--model", str(model), "--views", "4"]
    server, heard = listen(tmp_path, "-m", "service.cli", "serve", *knobs)
    with server:
        try:
            assert server.stdout is not None
            found = re.search(r"http://\S+", server.stdout.readline())
            assert found, "the service did not start"
            body = {
                "image": base64.b64encode(photo).decode(),
                "candidate_labels": ["cat", "dog"],
            }
            with httpx.Client(base_url=found.group(), timeout=60) as http:
                assert http.post("/v1/classify", json=body).status_code == 200
                for path in ("/", "/docs", "/info", "/metrics", "/readyz"):
                    assert http.get(path).status_code == 200
        finally:
            server.terminate()
            server.wait(60)
    lines = heard.read_text().splitlines()
    pids = {line.split()[0] for line in lines if line.endswith("listening")}
    assert len(pids) >= 2, "the server and its worker"
    assert [line for line in lines if not line.endswith("listening")] == []
