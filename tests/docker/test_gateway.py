"""docker/gateway under Debian's nginx, in front of replicas in processes of their own."""

import re
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from hashlib import sha256
from pathlib import Path
from typing import Any

import httpx
import pytest

from benchmarks.harness.gateway import CONFIGURATION, NGINX, Gateway
from benchmarks.harness.load import ClosedLoop
from benchmarks.harness.requests import LABELS, classification, draw_file
from service.settings import Settings
from tests.fake_server import FakeServer

BODY = classification(draw_file(0), LABELS)
PATIENCE = 60.0

START = Callable[..., FakeServer]

needs_nginx = pytest.mark.skipif(NGINX is None, reason="nginx is not installed")


@pytest.fixture
def start() -> Iterator[START]:
    """Starts replicas whose model has this name and takes so many seconds for a batch."""
    started: list[FakeServer] = []

    def start(name: str, seconds: float, **knobs: Any) -> FakeServer:
        started.append(FakeServer(f"{name}:{seconds}", **knobs))
        return started[-1]

    yield start
    for replica in started:
        replica.kill()


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Callable[..., Gateway]]:
    """Puts the gateway before some replicas, by default without its limit of requests."""
    with ExitStack() as stack:

        def gate(*replicas: FakeServer, rate: str = "100000r/s") -> Gateway:
            ports = [replica.port for replica in replicas]
            return stack.enter_context(Gateway(tmp_path, ports, rate))

        yield gate


def until(true: Callable[[], object]) -> None:
    limit = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < limit
        time.sleep(0.02)


def directive(name: str) -> str:
    found = re.findall(rf"^\s*{name} ([^;]*);", (CONFIGURATION / "nginx.conf").read_text(), re.M)
    assert len(found) == 1, f"{name}: {found}"
    return str(found[0])


def test_its_limits_are_those_of_the_service() -> None:
    settings = Settings()
    assert directive("client_max_body_size") == f"{settings.max_body_bytes // 2**20}m"
    assert directive("client_body_timeout") == f"{settings.upload_timeout_ms // 1000}s"
    # The service answers late requests itself, and closes idle connections last.
    assert int(directive("proxy_read_timeout")[:-1]) > settings.request_timeout_ms / 1000 + 5
    assert int(directive("keepalive_timeout").split("s")[0]) < Settings().keep_alive_s


@needs_nginx
def test_what_passes_and_what_is_refused(
    start: START, gate: Callable[..., Gateway], tmp_path: Path
) -> None:
    listed = "sha256:" + sha256(b"s3cret").hexdigest()
    replica = start("a", 0.0, api_keys=listed)
    gateway = gate(replica)
    http = gateway.http
    key = {"Authorization": "Bearer s3cret"}

    answer = http.post("/v1/classify", json=BODY, headers=key | {"X-Request-Id": "mine"})
    assert (answer.status_code, answer.json()["id"]) == (200, "mine")
    assert answer.headers["X-Request-Id"] == "mine"
    log = tmp_path / "access.log"
    until(lambda: '"request_id":"mine"' in log.read_text())
    assert '"client":"127.0.0.1"' in log.read_text()  # as the runbook's command counts
    answer = http.post("/v1/classify", json=BODY, headers=key | {"X-Request-Id": 'no"quote'})
    assert re.fullmatch("[0-9a-f]{32}", answer.json()["id"])

    refused = http.post("/v1/classify", json=BODY, headers={"Authorization": "Bearer wrong"})
    assert (refused.status_code, refused.json()["error_type"]) == (401, "unauthorized")
    large = http.post("/v1/classify", content=bytes(17 * 2**20), headers={"X-Request-Id": "big"})
    assert large.status_code == 413
    assert large.json() == {
        "error": "The body is too large.",
        "error_type": "too_large",
        "request_id": "big",
    }
    assert large.headers["X-Request-Id"] == "big"
    hidden = http.get("/metrics")
    assert (hidden.status_code, hidden.json()["error_type"]) == (404, "not_found")
    assert http.get("/readyz").json() == {"status": "ok"}
    plain = httpx.get(gateway.url.replace("https", "http") + "/readyz")
    assert plain.status_code == 400  # TLS only

    replica.kill()
    gone = http.post("/v1/classify", json=BODY, headers=key)
    assert (gone.status_code, gone.json()["error_type"]) == (503, "not_ready")
    assert int(gone.headers["Retry-After"]) > 0


@needs_nginx
def test_too_many_requests_from_one_address_are_refused_with_a_hint(
    start: START, gate: Callable[..., Gateway]
) -> None:
    http = gate(start("a", 0.0), rate="1r/m").http
    answers = [http.get("/info") for _ in range(106)]  # 100 at once are let through
    refused = [answer for answer in answers if answer.status_code != 200]
    assert 3 <= len(refused) <= 6
    assert {answer.status_code for answer in refused} == {429}
    assert refused[0].json()["error_type"] == "rate_limited"
    assert int(refused[0].headers["Retry-After"]) > 0
    assert http.get("/readyz").status_code == 200  # probes are not counted


@needs_nginx
def test_a_full_queue_is_told_and_never_tried_elsewhere(
    start: START, gate: Callable[..., Gateway], tmp_path: Path
) -> None:
    log = tmp_path / "access.log"
    replicas = [start(name, 0.5, max_queue_size=1, max_batch_size=1) for name in "ab"]
    gateway = gate(*replicas)
    load = ClosedLoop(gateway.client, BODY, 12)
    until(lambda: sum(answer.status == 429 for answer in load.answers) > 20)
    load.stop()
    full = [answer for answer in load.answers if answer.status == 429]
    assert {answer.status for answer in load.answers} == {200, 429}
    assert all('"queue_full"' in answer.text for answer in full)
    until(lambda: len(re.findall('"status":429', log.read_text())) == len(full))
    assert set(re.findall('"status":429.*"replica_status":"(.*?)"', log.read_text())) == {"429"}


@needs_nginx
def test_the_replica_with_fewer_open_requests_is_asked(
    start: START, gate: Callable[..., Gateway]
) -> None:
    slow, fast = start("slow", 1.0, max_batch_size=1), start("fast", 0.02, max_batch_size=1)
    gateway = gate(slow, fast)
    load = ClosedLoop(gateway.client, BODY, 4)
    until(lambda: len(load.answers) >= 40)
    load.stop()
    names = [re.findall('"model":"(.*?)"', answer.text)[0] for answer in load.answers]
    assert names.count("fast") > 2 * names.count("slow")


@needs_nginx
def test_a_kill_a_drain_and_a_rolling_restart_lose_no_request(
    start: START, gate: Callable[..., Gateway], tmp_path: Path
) -> None:
    first, second = start("version-1", 0.2), start("version-1", 0.2)
    gateway = gate(first, second)
    load = ClosedLoop(gateway.client, BODY, 6)

    def count(name: str) -> int:
        return sum(f'"{name}"' in answer.text for answer in load.answers)

    def go_on() -> None:
        reached = len(load.answers) + 40
        until(lambda: len(load.answers) >= reached)

    try:
        go_on()
        first.kill()
        go_on()
        first = start("version-2", 0.2, port=first.port)
        until(lambda: count("version-2") > 20)
        second.stop()
        assert second.process.returncode == 0  # drained
        second = start("version-2", 0.2, port=second.port)
        before = count("version-1")
        go_on()
    finally:
        load.stop()
    lost = [answer for answer in load.answers if answer.status != 200]
    assert not lost, lost[:3]
    assert count("version-1") == before
    assert len(load.answers) >= 140
    retried = re.findall(r'"replicas":"\S+, ', (tmp_path / "access.log").read_text())
    assert retried  # there was something to lose
