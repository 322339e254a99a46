"""What one key may ask: at once, over time, and without a word of it to the others."""

import base64
import re
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.errors import RateLimited
from service.intake.limits import Limits
from service.settings import Settings
from service.telemetry.metrics import Metrics
from tests.conftest import Server
from tests.fake_worker import FakeWorker

START = Callable[..., Server]


class Harness:
    """Limits with a clock that the test turns."""

    def __init__(self, **knobs: Any) -> None:
        self.now = 100.0
        self.metrics = Metrics()
        self.limits = Limits(Settings(**knobs), self.metrics, lambda: self.now)

    def ask(self, caller: str = "a") -> float | None:
        """None when the request was let in, else the seconds to wait."""
        try:
            with self.limits.admit(caller):
                return None
        except RateLimited as refusal:
            return refusal.retry_after

    def rejected(self, reason: str) -> float | None:
        return self.metrics.registry.get_sample_value("tapt_rejected_total", {"reason": reason})


def test_by_default_there_is_no_limit() -> None:
    harness = Harness()
    with ExitStack() as running:
        for _ in range(1000):
            running.enter_context(harness.limits.admit("a"))


def test_a_burst_is_let_in_and_then_the_rate_holds() -> None:
    harness = Harness(key_rate=2, key_burst=3)
    assert [harness.ask() for _ in range(5)] == [None, None, None, 0.5, 0.5]
    harness.now += 0.5
    assert harness.ask() is None
    assert harness.ask() == 0.5
    assert harness.rejected("key_rate") == 3
    harness.now += 1000
    assert [harness.ask() for _ in range(4)] == [None, None, None, 0.5]


def test_whoever_waits_as_told_is_let_in() -> None:
    harness = Harness(key_rate=0.3, key_burst=1)
    assert harness.ask() is None
    for _ in range(100):
        wait = harness.ask()
        assert wait is not None
        harness.now += wait + 1e-9
        assert harness.ask() is None


@settings(deadline=None)
@given(pauses=st.lists(st.floats(0, 3), max_size=60), burst=st.integers(1, 5))
def test_no_pattern_of_requests_beats_the_rate(pauses: list[float], burst: int) -> None:
    harness = Harness(key_rate=2, key_burst=burst)
    began, admitted = harness.now, 0
    for pause in pauses:
        harness.now += pause
        admitted += harness.ask() is None
    assert admitted <= burst + 2 * (harness.now - began) + 1e-6


def test_an_expensive_request_costs_its_price_and_the_next_ones_wait_for_it() -> None:
    harness = Harness(key_rate=2, key_burst=3)
    with harness.limits.admit("a"):
        harness.limits.charge("a", 7.0)  # 1 is spent already
    assert harness.ask() == (1 + 4) / 2
    assert harness.ask("b") is None
    harness.now += 2.5
    assert harness.ask() is None
    with harness.limits.admit("b"):
        harness.limits.charge("b", 0.1)  # a cheap one still costs 1
    assert [harness.ask("b") for _ in range(3)] == [None, None, 0.5]


def test_over_http_many_labels_cost_more_than_few(start: START, photo: bytes) -> None:
    server = start(key_rate=0.001, key_burst=20)
    image = base64.b64encode(photo).decode()
    few, many = ({"image": image, "candidate_labels": [f"{i}" for i in range(n)]} for n in (2, 900))
    assert [server.http.post("/v1/classify", json=few).status_code for _ in range(3)] == [200] * 3
    assert server.http.post("/v1/classify", json=many).status_code == 200
    assert server.http.post("/v1/classify", json=few).status_code == 429


def test_keys_do_not_notice_each_other() -> None:
    harness = Harness(key_rate=1, key_burst=1, key_concurrency=1)
    assert harness.ask("a") is None
    assert harness.ask("a") is not None
    assert harness.ask("b") is None
    harness.now += 10
    with harness.limits.admit("a"):
        assert harness.ask("a") == 1
        assert harness.ask("b") is None
    assert harness.rejected("key_concurrency") == 1


def test_a_request_that_fails_gives_its_place_back() -> None:
    harness = Harness(key_concurrency=1)
    for _ in range(3):
        with pytest.raises(ZeroDivisionError), harness.limits.admit("a"):
            raise ZeroDivisionError
    assert harness.ask() is None


def test_over_http_a_limited_key_is_429_and_another_is_served(start: START, photo: bytes) -> None:
    worker = FakeWorker(automatic=False)
    server = start(worker, api_keys="alpha,beta", key_concurrency=1)
    server.call(worker.be_ready)
    body = {"image": base64.b64encode(photo).decode(), "candidate_labels": ["a", "b"]}

    def post(key: str) -> Any:
        header = {"Authorization": f"Bearer {key}"}
        return server.http.post("/v1/classify", json=body, headers=header)

    with ThreadPoolExecutor() as clients:
        first = clients.submit(post, "alpha")
        server.wait(lambda: worker.batches)
        refused = post("alpha")
        other = clients.submit(post, "beta")
        server.wait(lambda: server.app.state.engine.queue_depth == 1)
        server.call(worker.finish)
        server.wait(lambda: len(worker.batches) == 2)
        server.call(worker.finish)
        assert first.result().status_code == other.result().status_code == 200
    assert refused.status_code == 429
    assert refused.json()["error_type"] == "rate_limited"
    assert refused.headers["retry-after"] == "1"


def test_over_http_a_queue_that_one_key_filled_has_a_share_for_another(
    start: START, photo: bytes
) -> None:
    worker = FakeWorker(automatic=False)
    server = start(worker, api_keys="alpha,beta", max_queue_size=3, max_batch_size=1)
    server.call(worker.be_ready)
    body = {"image": base64.b64encode(photo).decode(), "candidate_labels": ["a", "b"]}
    engine = server.app.state.engine

    def post(key: str) -> Any:
        header = {"Authorization": f"Bearer {key}"}
        return server.http.post("/v1/classify", json=body, headers=header)

    with ThreadPoolExecutor() as clients:
        answers = [clients.submit(post, "alpha")]
        server.wait(lambda: worker.batches and engine.queue_depth == 0)
        answers += [clients.submit(post, "alpha") for _ in range(2)]
        server.wait(lambda: engine.queue_depth == 2)
        refused = post("alpha")
        answers.append(clients.submit(post, "beta"))
        server.wait(lambda: engine.queue_depth == 3)
        for count in (1, 2, 3, 4):
            server.wait(lambda count=count: len(worker.batches) >= count)  # type: ignore[misc]
            server.call(worker.finish)
        assert [answer.result().status_code for answer in answers] == [200] * 4
    assert refused.status_code == 429
    assert refused.json()["error_type"] == "queue_full"


def test_a_limited_key_is_refused_before_its_body_is_read(start: START, photo: bytes) -> None:
    server = start(key_rate=0.001, key_burst=1)
    body = {"image": base64.b64encode(photo).decode(), "candidate_labels": ["a", "b"]}
    assert server.http.post("/v1/classify", json=body).is_success
    with socket.create_connection(("127.0.0.1", server.port)) as client:
        client.sendall(b"POST /v1/classify HTTP/1.1\r\nHost: x\r\nContent-Length: 5000\r\n\r\n")
        client.settimeout(10)
        head, _, _ = client.recv(4096).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 429 ")
    assert re.search(rb"retry-after: (9\d\d|1000)\b", head)
    metrics = server.http.get("/metrics").text
    assert 'tapt_rejected_total{reason="key_rate"} 1.0' in metrics
