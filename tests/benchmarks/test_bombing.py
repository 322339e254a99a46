"""The watch over a service that is sent expensive files sees each broken promise."""

import os
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock, Thread

import numpy as np
import pytest

from benchmarks import bombing
from benchmarks.bombing import Effect, Summary, Target, form, resident
from benchmarks.bombs import bombs, variants
from benchmarks.bombs.build import MAX_BYTES
from benchmarks.fuzz import mutate
from service.intake.multipart import read_form
from service.intake.requests import ClassifyOptions

pytestmark = pytest.mark.alone

SLOW = 1.5  # seconds; half of it is the bound of what is quick


class Handler(BaseHTTPRequestHandler):
    """Does what the file says."""

    busy = False
    first = Lock()

    def do_GET(self) -> None:
        time.sleep(SLOW if Handler.busy else 0)
        self._answer(200)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        Handler.busy = b"block" in body
        held = np.ones(200 * 2**20 if b"grow" in body else 1, np.uint8)
        time.sleep(SLOW if b"slow" in body or b"grow" in body or Handler.busy else 0)
        Handler.busy = False
        status = 500 if b"fail" in body else 429 if b"busy" in body else 400
        if b"first" in body and not Handler.first.acquire(blocking=False):
            status = 429
        self._answer(status if held[0] else 0)

    def _answer(self, status: int) -> None:
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None: ...


@pytest.fixture
def target(monkeypatch: pytest.MonkeyPatch) -> Iterator[Target]:
    monkeypatch.setattr(bombing, "MAX_LIVEZ", SLOW / 2)
    monkeypatch.setattr(bombing, "MAX_ANSWER", SLOW / 2)
    monkeypatch.setattr(bombing, "MAX_GROWTH", 100.0)
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield Target(f"http://127.0.0.1:{server.server_port}", os.getpid())
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("file", "sentences"),
    [
        (b"nothing", []),
        (b"slow", ["answered after"]),
        (b"block", ["answered after", "/livez answered after"]),
        (b"grow", ["answered after", "MB"]),
        (b"fail", ["answered 500"]),
    ],
)
def test_each_broken_promise_is_seen(target: Target, file: bytes, sentences: list[str]) -> None:
    effect = target.strike("file", file)
    found = effect.broken()
    assert len(found) == len(sentences)
    assert all(part in sentence for part, sentence in zip(sentences, found, strict=True))


@pytest.mark.parametrize(
    ("file", "status", "copies", "broken"),
    [(b"busy", 429, 1, 1), (b"busy", 429, 4, 1), (b"first", 400, 4, 0), (b"fail", 500, 4, 1)],
)
def test_of_several_files_at_once_some_may_be_told_to_wait(
    target: Target, file: bytes, status: int, copies: int, broken: int
) -> None:
    """Some, but not all."""
    effect = target.strike("file", file, copies)
    assert effect.status == status
    assert len(effect.broken()) == broken


def test_no_answer_breaks_a_promise() -> None:
    effect = Target("http://127.0.0.1:1", os.getpid()).strike("file", b"")
    assert effect.status == 0
    assert "file: answered 0" in effect.broken()
    assert any("/livez" in sentence for sentence in effect.broken())


def test_a_summary_keeps_the_worst() -> None:
    summary = Summary()
    summary.add(Effect("a", 200, 1.0, 0.5, 10))
    summary.add(Effect("b", 422, 9.0, 0.1, 20))
    assert (summary.worst.answer, summary.worst.livez, summary.worst.growth) == (9.0, 0.5, 20)
    assert summary.statuses == {200: 1, 422: 1}
    assert summary.broken == ["b: answered after 9.0 s"]


def test_memory_is_that_of_all_processes() -> None:
    before = resident(os.getpid())
    held = np.ones(100_000_000, np.uint8)
    assert 90 < resident(os.getpid()) - before < 120, held[0]


def test_the_request_is_one_that_the_service_reads() -> None:
    file, rest = read_form(form(b"\xff\xd8"), "multipart/form-data; boundary=bomb", 10)
    assert file == b"\xff\xd8"
    assert ClassifyOptions.model_validate(rest).candidate_labels == ["cat", "dog"]


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF"])
def test_bombs_fit_into_a_request_and_have_variants(kind: str) -> None:
    files = dict(bombs(kind))
    assert len(files) > 10
    for file in files.values():
        assert 16 < len(file) <= MAX_BYTES
    file = next(iter(files.values()))
    damaged = dict(variants(file, mutate, 0))
    assert damaged == dict(variants(file, mutate, 0))
    assert file not in damaged.values()
