"""docker/gateway under Debian's nginx, in front of replicas in processes of their own."""

import os
import re
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from hashlib import sha256
from http.client import HTTPResponse
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from benchmarks.harness.gateway import CONFIGURATION, NGINX, Gateway
from benchmarks.harness.load import ClosedLoop
from benchmarks.harness.report import ROOT
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


def connect(gateway: Gateway, sender: str = "127.0.0.1") -> ssl.SSLSocket:
    """A connection from one of this machine's addresses."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # other tests check it
    plain = socket.create_connection(("127.0.0.1", gateway.port), PATIENCE, (sender, 0))
    return context.wrap_socket(plain)


def read_answer(connection: ssl.SSLSocket) -> httpx.Response:
    """The answer to a request that was not sent by httpx."""
    answer = HTTPResponse(connection)
    answer.begin()
    return httpx.Response(answer.status, headers=dict(answer.headers), content=answer.read())


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
    assert (plain.status_code, plain.json()["error_type"]) == (400, "bad_request")  # TLS only

    replica.kill()
    gone = http.post("/v1/classify", json=BODY, headers=key)
    assert (gone.status_code, gone.json()["error_type"]) == (503, "not_ready")
    assert int(gone.headers["Retry-After"]) > 0


MALFORMED = {
    "line": b"GARBAGE",
    "URL": b"GET /%zz HTTP/1.1\r\nHost: a",
    "version": b"GET / HTTP/3.0\r\nHost: a",
    "host": b"GET / HTTP/1.1",
    "header": b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"a" * 10_000,
    "length": b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: x",
    "encoding": b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip",
}


@needs_nginx
def test_errors_of_the_gateway_have_the_shape_of_the_services(
    start: START, gate: Callable[..., Gateway], tmp_path: Path
) -> None:
    gateway = gate(start("a", 0.0))

    def ask(head: bytes) -> httpx.Response:
        with connect(gateway) as connection:
            connection.sendall(head + b"\r\nConnection: close\r\n\r\n")
            return read_answer(connection)

    def shape(answer: httpx.Response) -> tuple[int, str]:
        body = answer.json()
        assert body.keys() == {"error", "error_type", "request_id"}
        assert body["request_id"] == answer.headers["X-Request-Id"]
        return answer.status_code, body["error_type"]

    for what, head in MALFORMED.items():
        assert shape(ask(head)) == (400, "bad_request"), what
    # One TLS record: the gateway has read all of it when it answers and closes.
    long = b"GET /" + b"a" * 10_000 + b" HTTP/1.1\r\nHost: a"
    assert shape(ask(long)) == (414, "bad_request")
    assert shape(ask(b"TRACE / HTTP/1.1\r\nHost: a")) == (405, "method_not_allowed")
    (tmp_path / "body").rmdir()  # like a full disk
    broken = gateway.http.post("/v1/classify", content=bytes(2**20))
    assert shape(broken) == (500, "internal")


def limits() -> dict[str, int]:
    """How many connections may be open in each zone."""
    text = (CONFIGURATION / "nginx.conf").read_text()
    return {
        zone: int(most) for zone, most in re.findall(r"^\s*limit_conn (\w+) (\d+);", text, re.M)
    }


def test_large_bodies_fit_into_the_memory_that_compose_gives() -> None:
    service = yaml.safe_load((ROOT / "docker/compose.yaml").read_text())["services"]["gateway"]
    (mount,) = service["tmpfs"]
    room = re.fullmatch(r"/tmp:size=(\d+)g,.*", mount)
    memory = re.fullmatch(r"(\d+)g", service["mem_limit"])
    assert room
    assert memory
    most = limits()["large_bodies"] * int(directive("client_max_body_size")[:-1])  # MiB
    assert most < 1024 * int(room[1]) < 1024 * int(memory[1])
    assert directive("proxy_max_temp_file_size") == "0"  # answers take none of it
    # What is not counted stays in memory.
    assert int(directive("client_body_buffer_size")[:-1]) * 1024 >= 100_000


@needs_nginx
def test_slow_uploads_cannot_fill_the_disk_and_leave_room_for_others(
    start: START, gate: Callable[..., Gateway], tmp_path: Path
) -> None:
    gateway = gate(start("a", 0.0))
    total, each = limits()["large_bodies"], limits()["large_bodies_of_sender"]
    assert 1 < total / each < 255
    uploads: list[ssl.SSLSocket] = []

    def upload(sender: int, length: bytes = b"Content-Length: 16000000") -> ssl.SSLSocket:
        """The head of a large upload."""
        uploads.append(connect(gateway, f"127.0.0.{sender}"))
        head = b"POST /v1/classify HTTP/1.1\r\nHost: a\r\n" + length + b"\r\n\r\n"
        uploads[-1].sendall(head)
        return uploads[-1]

    def count() -> int:
        """How many bodies are on the disk. nginx unlinks their files while they are open."""
        master = gateway._process.pid
        (worker,) = Path(f"/proc/{master}/task/{master}/children").read_text().split()
        found = 0
        for file in Path(f"/proc/{worker}/fd").iterdir():
            with suppress(FileNotFoundError):  # closed meanwhile
                found += os.readlink(file).startswith(f"{tmp_path / 'body'}/")
        return found

    try:
        for number in range(total):
            # More than the buffer holds; the rest never comes.
            upload(2 + number // each).sendall(bytes(300_000))
        until(lambda: count() == total)
        for refused in (
            upload(2),  # has its share
            upload(200),  # a newcomer finds no room
            upload(200, b"Transfer-Encoding: chunked"),
        ):
            assert read_answer(refused).status_code == 429
        assert count() == total
        # Small requests and health checks pass.
        assert gateway.http.post("/v1/classify", json=BODY).status_code == 200
        assert gateway.http.get("/readyz").status_code == 200
    finally:
        for one in uploads:
            one.close()
    until(lambda: count() == 0)
    assert gateway.http.post("/v1/classify", content=bytes(2**20)).status_code == 400


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
