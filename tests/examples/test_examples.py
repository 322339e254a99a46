"""Every example is run as its reader would run it, against a server on a socket."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from service.messages import Answer, Task
from service.settings import CLIENT_KEY
from tests.conftest import Server
from tests.fake_worker import FakeWorker, answer

EXAMPLES = Path(__file__).parents[2] / "examples"
COMMANDS = {"sh": "sh", "py": sys.executable, "mjs": "node"}
START = Callable[..., Server]

every = pytest.mark.parametrize("kind", COMMANDS)


def run(
    kind: str, server: Server, *arguments: str, key: str = ""
) -> subprocess.CompletedProcess[str]:
    command = COMMANDS[kind]
    for needed in (command, *(["curl"] if kind == "sh" else [])):
        if shutil.which(needed) is None:
            pytest.skip(f"{needed} is not installed, so examples/classify.{kind} was not run")
    environment = {**os.environ, "CLASSIFY_URL": server.url} | ({CLIENT_KEY: key} if key else {})
    return subprocess.run(
        [command, str(EXAMPLES / f"classify.{kind}"), *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment,
    )


def reply(work: Task) -> Answer:
    """Undefended CLIP falls for the second label."""
    found = answer(work)
    return replace(found, scores=found.scores[::-1]) if work.method == "plain" else found


@pytest.fixture
def image(photo: bytes, tmp_path: Path) -> str:
    path = tmp_path / "a photo; of, a cat.jpg"
    path.write_bytes(photo)
    return str(path)


@every
def test_an_example_answers(kind: str, start: START, image: str) -> None:
    worker = FakeWorker(reply)
    done = run(kind, start(worker), image, "a cat, asleep", 'dog\'s "bone"')
    assert done.returncode == 0, done.stderr
    assert worker.batches[0][0].labels == ("a cat, asleep", 'dog\'s "bone"')
    if kind == "sh":
        assert json.loads(done.stdout)["labels"][0]["label"] == "a cat, asleep"
    else:
        assert done.stdout.splitlines() == [
            'undefended  dog\'s "bone"  1.000',
            "defended    a cat, asleep  1.000",
        ]


@every
def test_an_example_sends_its_key(kind: str, start: START, image: str) -> None:
    server = start(api_keys="sesame")
    sent = run(kind, server, image, "cat", "dog", key="sesame")
    assert sent.returncode == 0
    refused = run(kind, server, image, "cat", "dog")
    assert refused.returncode != 0
    assert "A valid API key is needed." in refused.stdout + refused.stderr


@every
def test_an_example_shows_why_a_file_is_too_large(kind: str, start: START, tmp_path: Path) -> None:
    server = start(max_body_bytes=2**20)
    (tmp_path / "large.jpg").write_bytes(bytes(20 * 2**20))
    refused = run(kind, server, str(tmp_path / "large.jpg"), "cat", "dog")
    assert refused.returncode != 0
    assert f"The body is larger than {2**20} bytes." in refused.stdout + refused.stderr


@every
def test_an_example_waits_for_a_busy_server(kind: str, start: START, image: str) -> None:
    worker = FakeWorker(automatic=False)
    server = start(worker)  # not ready: 503 with Retry-After
    server.app.state.metrics.rejected.labels("not_ready")

    def refused() -> bool:
        return server.app.state.metrics.rejected.labels("not_ready")._value.get() > 0

    def get_ready() -> None:
        worker.automatic = True
        worker.be_ready()

    server.loop.call_soon_threadsafe(_when, server, refused, get_ready)
    assert run(kind, server, image, "cat", "dog").returncode == 0
    assert refused()


def _when(server: Server, condition: Callable[[], bool], act: Callable[[], None]) -> None:
    """On the server's loop: act as soon as the condition holds."""
    if condition():
        act()
    else:
        server.loop.call_later(0.01, _when, server, condition, act)
