"""What a single connection can make the server spend, with clients that misbehave on purpose."""

import contextlib
import json
import logging
import os
import resource
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.http import connections
from service.http.authentication import entry
from service.http.connections import limit_connections, raise_descriptor_limit
from service.telemetry.logs import OncePerMinute
from tests.conftest import Server
from tests.fake_server import FakeServer
from tests.fake_worker import FakeWorker

pytestmark = pytest.mark.alone

START = Callable[..., Server]
PATIENCE = 60.0  # seconds, on a busy machine
PIXEL = (
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk"
    "+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
CHUNKED = b"POST /v1/classify HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
BYTES = b"1\r\nx\r\n"  # a chunk of one byte


def request(**fields: Any) -> bytes:
    body = json.dumps({"image": PIXEL, "candidate_labels": ["a", "b"]} | fields).encode()
    head = b"POST /v1/classify HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body)
    return head + body


def connect(server: Server | FakeServer) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE)


def read_all(client: socket.socket) -> bytes:
    """Everything until the server closes."""
    received = b""
    while data := client.recv(65536):
        received += data
    return received


def is_reset(send: Callable[[], object]) -> bool:
    """Whether the server resets the connection while its client goes on sending."""
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        try:
            send()
        except BlockingIOError:
            pass
        except ConnectionError:
            return True
        time.sleep(0.002)
    return False


def open_connections(server: Server) -> int:
    return int(server.call(lambda: len(server._uvicorn.server_state.connections)))


# Parsing.


def longest_wait(service: FakeServer, seconds: float) -> float:
    """The slowest of the answers to `/livez` in a while."""
    slowest, until = 0.0, time.monotonic() + seconds
    while time.monotonic() < until:
        began = time.monotonic()
        assert httpx.get(f"{service.url}/livez", timeout=PATIENCE).status_code == 200
        slowest = max(slowest, time.monotonic() - began)
    return slowest


@contextlib.contextmanager
def flood(service: FakeServer, clients: int) -> Iterator[None]:
    """Clients that send chunks of one byte as fast as they can, again when they are cut off."""
    over = threading.Event()

    def run() -> None:
        while not over.is_set():
            with contextlib.suppress(OSError), connect(service) as client:
                client.settimeout(0.2)
                client.sendall(CHUNKED)
                while not over.is_set():
                    with contextlib.suppress(TimeoutError):
                        client.send(BYTES * 40_000)

    threads = [threading.Thread(target=run) for _ in range(clients)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        over.set()
        for thread in threads:
            thread.join()


@pytest.mark.parametrize("knobs", [{}, {"api_keys": entry("sesame")}], ids=["open", "with keys"])
def test_bodies_in_chunks_of_a_byte_delay_nobody(knobs: dict[str, Any]) -> None:
    with FakeServer("slow", **knobs) as service, flood(service, clients=16):
        time.sleep(0.5)
        assert longest_wait(service, 3.0) < 2.0


def test_costly_parsing_takes_turns(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two turns of the event loop the parser is given one slice of one such body."""
    turns: list[int] = []
    parse = connections._Connection.parse_queued

    def count(connection: connections._Connection) -> None:
        before = connection._parser.events
        parse(connection)
        turns.append(connection._parser.events - before)

    monkeypatch.setattr(connections._Connection, "parse_queued", count)
    with connect(server) as client:
        client.sendall(CHUNKED + BYTES * 20_000 + b"0\r\n\r\n")
        assert client.recv(65536).startswith(b"HTTP/1.1 400 ")
    assert len(turns) > 20_000 * len(BYTES) / connections.SLICE - 5
    assert max(turns) <= connections.SLICE / len(BYTES) + 5


# Refusals.


def test_a_refused_body_is_not_read(start: START) -> None:
    server = start(api_keys=entry("sesame"))
    with connect(server) as client:
        client.sendall(CHUNKED + BYTES)
        received = read_all(client)  # though the body never ends
    assert received.startswith(b"HTTP/1.1 401 ")
    assert b"\r\nconnection: close\r\n" in received


def test_a_refusal_is_read_though_the_body_was_on_its_way(start: START) -> None:
    """Were the connection closed at once, it would be reset, and the answer lost with it."""
    server = start(api_keys=entry("sesame"))
    body = bytes(8 * 2**20)
    for _ in range(5):
        with connect(server) as client:
            client.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999\r\n\r\n" + body)
            assert read_all(client).startswith(b"HTTP/1.1 401 ")


def test_what_follows_a_refusal_is_not_waited_for_long(
    start: START, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "LINGER", 0.2)
    server = start(api_keys=entry("sesame"))
    with connect(server) as client:
        client.sendall(CHUNKED)
        assert read_all(client).startswith(b"HTTP/1.1 401 ")
        server.wait(lambda: not server._uvicorn.server_state.connections)
        assert is_reset(lambda: client.sendall(BYTES))


def test_a_refused_body_is_discarded_only_so_far(
    start: START, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "DISCARDED", 2**20)
    server = start(api_keys=entry("sesame"))
    with connect(server) as client:
        client.sendall(CHUNKED)
        assert client.recv(65536).startswith(b"HTTP/1.1 401 ")
        client.settimeout(0.5)
        sent = 0
        with contextlib.suppress(TimeoutError):
            while sent < 2**27:
                sent += client.send(bytes(2**16))
        assert sent < 2**26  # the rest is in the system's buffers
    server.wait(lambda: not server._uvicorn.server_state.connections)


def test_a_refusal_of_a_whole_request_keeps_the_connection(start: START) -> None:
    server = start(api_keys=entry("sesame"))
    with connect(server) as client:
        for _ in range(2):
            client.sendall(request())
            received = b""
            while not received.endswith(b"}"):
                received += client.recv(65536)
            assert received.startswith(b"HTTP/1.1 401 ")


# Answers.


def test_an_answer_that_is_not_taken_ends_the_connection(start: START) -> None:
    server = start(upload_timeout_ms=300)
    ask = b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n"
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", server.port))
        client.setblocking(False)
        assert is_reset(lambda: client.send(ask * 10))
    server.wait(lambda: not server._uvicorn.server_state.connections)


def test_a_slow_reader_gets_all_of_it(server: Server) -> None:
    whole = server.http.get("/docs/swagger-ui-bundle.js").content
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        client.connect(("127.0.0.1", server.port))
        client.sendall(
            b"GET /docs/swagger-ui-bundle.js HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
        )
        received = b""
        while data := client.recv(100_000):
            received += data
            time.sleep(0.01)
    assert received.endswith(whole)


# Pipelining.


def test_a_client_that_pipelines_and_leaves_is_noticed(start: START) -> None:
    worker = FakeWorker(automatic=False)
    server = start(worker)
    server.call(worker.be_ready)
    with connect(server) as client:
        client.sendall(request() + b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")
        server.wait(lambda: worker.batches)
    server.wait(lambda: worker.cancelled)


def test_a_client_that_sends_too_far_ahead_is_cut_off(start: START) -> None:
    worker = FakeWorker(automatic=False)
    server = start(worker)
    server.call(worker.be_ready)
    with connect(server) as client:
        client.sendall(request())
        server.wait(lambda: worker.batches)
        with contextlib.suppress(ConnectionError):
            client.sendall(bytes(2**20))
        server.wait(lambda: worker.cancelled)


def test_pipelined_requests_are_answered_in_order(server: Server) -> None:
    with connect(server) as client:
        asked = [b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n", request(), request(top_k=1)] * 3
        last = b"GET /startupz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
        client.sendall(b"".join(asked) + last)
        received = read_all(client)
    assert received.count(b"HTTP/1.1 200 OK") == 10
    assert [b'"model"' in part for part in received.split(b"HTTP/1.1 ")[1:]] == (
        [False, True, True] * 3 + [False]
    )


def test_an_offer_to_upgrade_is_answered_without_a_warning(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    headers = {"Connection": "Upgrade, HTTP2-Settings", "Upgrade": "h2c", "HTTP2-Settings": "AAMA"}
    with caplog.at_level(logging.WARNING):
        assert server.http.get("/livez", headers=headers).status_code == 200
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


# Descriptors.


@pytest.mark.parametrize("limited", ["descriptors", "connections"])
def test_when_all_connections_are_taken_the_oldest_idle_one_makes_room(
    start: START, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, limited: str
) -> None:
    if limited == "descriptors":
        monkeypatch.setattr(resource, "getrlimit", lambda _: (40, 40))  # 10 connections
    else:
        monkeypatch.setattr(connections, "MAX_CONNECTIONS", 10)
    worker = FakeWorker(automatic=False)
    server = start(worker)
    server.call(worker.be_ready)
    with contextlib.ExitStack() as stack:
        busy = stack.enter_context(connect(server))
        busy.sendall(request())
        server.wait(lambda: worker.batches)
        idle = [stack.enter_context(connect(server)) for _ in range(30)]
        assert httpx.get(f"{server.url}/livez").status_code == 200
        assert open_connections(server) <= 10
        assert idle[0].recv(1) == b""
        server.call(worker.finish)
        assert busy.recv(65536).startswith(b"HTTP/1.1 200 ")
    assert len([record for record in caplog.records if "connections are open" in record.msg]) == 1


def test_a_pipelined_request_is_under_way_when_it_is_its_turn(start: START) -> None:
    """And so its connection is none of those that make room."""
    worker = FakeWorker(automatic=False)
    server = start(worker)
    server.call(worker.be_ready)
    with connect(server) as client:
        client.sendall(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n" + request())
        server.wait(lambda: worker.batches)
        opened: Any = server._uvicorn.server_state.connections
        port = client.getsockname()[1]
        (connection,) = [each for each in opened if each.client[1] == port]
        assert connection not in connection.shared.idle
        server.call(worker.finish)
        server.wait(lambda: connection in connection.shared.idle)


def test_clients_that_take_no_answers_make_room_too(
    start: START, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "MAX_CONNECTIONS", 10)
    server = start()
    asks = b"GET /docs/swagger-ui-bundle.js HTTP/1.1\r\nHost: x\r\n\r\n" * 10
    with contextlib.ExitStack() as stack:
        for number in range(10):
            client = stack.enter_context(socket.socket())
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect(("127.0.0.1", server.port))
            client.sendall(asks)
            wait_to_write(server, number + 1)
        assert httpx.get(f"{server.url}/livez").status_code == 200
        assert open_connections(server) <= 10


def wait_to_write(server: Server, count: int) -> None:
    """Wait until the server waits for so many clients to read."""
    opened: Any = server._uvicorn.server_state.connections
    server.wait(lambda: sum(connection.flow.write_paused for connection in opened) == count)


def test_at_the_descriptor_limit_the_server_and_its_worker_recover(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with (
        log.open("w") as stderr,
        FakeServer("EchoRunner", limit="ulimit -n 64", stderr=stderr) as one,
    ):
        listed = Path(f"/proc/{one.process.pid}/task/{one.process.pid}/children").read_text()
        idle = [socket.create_connection(("127.0.0.1", one.port)) for _ in range(64)]
        for pid in listed.split():
            if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes():
                os.kill(int(pid), signal.SIGKILL)
        until = time.monotonic() + PATIENCE
        while httpx.get(f"{one.url}/readyz").status_code != 200:
            assert httpx.get(f"{one.url}/livez").status_code == 200
            assert time.monotonic() < until
            time.sleep(0.1)
        for client in idle:
            client.close()
    assert log.stat().st_size < 20_000


@pytest.mark.parametrize(
    ("limits", "wanted"),
    [
        ((256, resource.RLIM_INFINITY), [(10_240, resource.RLIM_INFINITY)]),  # macOS
        ((resource.RLIM_INFINITY, resource.RLIM_INFINITY), []),
        ((1024, 4096), [(4096, 4096)]),
        ((4096, 4096), []),
    ],
)
def test_the_descriptor_limit_is_raised_as_far_as_the_system_allows(
    monkeypatch: pytest.MonkeyPatch, limits: tuple[int, int], wanted: list[tuple[int, int]]
) -> None:
    asked: list[tuple[int, int]] = []

    def refuse(_: int, given: tuple[int, int]) -> None:
        asked.append(given)
        raise ValueError("current limit exceeds maximum limit")

    monkeypatch.setattr(resource, "getrlimit", lambda _: limits)
    monkeypatch.setattr(resource, "setrlimit", refuse)
    raise_descriptor_limit()
    assert asked == wanted
    assert limit_connections(1.0).shared.max_connections > 0  # type: ignore[attr-defined]


def test_a_message_is_logged_once_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr("service.telemetry.logs.time.monotonic", lambda: now)
    once = OncePerMinute()
    full = logging.makeLogRecord({"msg": "socket.accept() out of system resource\nsocket: 1"})
    other = logging.makeLogRecord({"msg": "something else"})
    assert [once.filter(record) for record in (full, full, other, full)] == [
        True,
        False,
        True,
        False,
    ]
    now += 61
    assert once.filter(full)
