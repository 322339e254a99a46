"""Faults of worker, server, clients and machine, injected for real, and seen as a client sees them.

Those of a worker alone are in test_worker.py, those of the model in test_runner.py, those of the
whole service with its model in test_service.py.
"""

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from benchmarks.harness.load import Record, drive, steady
from benchmarks.harness.requests import post_json
from benchmarks.harness.server import free_port
from tests.conftest import Server
from tests.fake_server import FakeServer, fake_command
from tests.fake_worker import FakeWorker

pytestmark = pytest.mark.alone

PIXEL = (
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk"
    "+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
PATIENCE = 120.0  # seconds, on a busy machine
SOON = 8.0  # seconds: what should take one, on a busy machine


def body(label: str = "cat", **fields: Any) -> dict[str, Any]:
    return {"image": PIXEL, "candidate_labels": [label, "dog"]} | fields


def ready_again(service: FakeServer) -> float:
    """Seconds until it is ready, with liveness all the while."""
    began = time.monotonic()
    while service.http.get("/readyz").status_code != 200:
        assert service.http.get("/livez").status_code == 200
        assert time.monotonic() - began < PATIENCE
        time.sleep(0.02)
    return time.monotonic() - began


def eventually(condition: Callable[[], object]) -> None:
    until = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


# The worker.


@pytest.fixture(scope="module")
def faulty() -> Iterator[FakeServer]:
    with FakeServer("FaultyRunner", max_queue_delay_ms=100) as service:
        yield service


@pytest.mark.parametrize(
    ("fault", "status", "error_type"),
    [
        ("kill", 503, None),
        ("exit", 503, None),
        ("hold", 503, None),
        ("noise", 503, None),
        ("memory", 500, "internal"),
        ("NaN", 500, "internal"),
        ("short", 500, "internal"),
        ("large", 500, "internal"),
        ("nothing", 500, "internal"),
        ("forgotten", 500, "internal"),
        ("twice", 200, None),
    ],
)
def test_a_fault_of_the_worker_stays_with_its_request(
    faulty: FakeServer, fault: str, status: int, error_type: str | None
) -> None:
    """Whatever a request does to the worker, it alone pays; the others are answered, once each,
    and the server is ready again."""
    ready_again(faulty)

    everybody = [post_json(body(label)) for label in ("cat", fault, "cow")]
    records = asyncio.run(drive(faulty.url, [0.0] * 3, everybody))
    assert [record.answers for record in records] == [1, 1, 1]
    first, poisoned, last = records
    assert poisoned.status == status
    if status == 503:
        assert poisoned.retry_after is not None
        assert poisoned.retry_after >= 1
    shared = fault == "memory"  # what the stand-in raises, the whole batch hears
    for record in (first, last):
        assert record.status in ({200, 500} if shared else {200})
    ready_again(faulty)
    if status != 503:  # once more, to see what it is told; after each loss the next start is later
        answer = faulty.http.post("/v1/classify", json=body(fault))
        assert (answer.status_code, answer.json().get("error_type")) == (status, error_type)
        if fault == "twice":  # the worker's second thought has no winner
            assert [each["score"] for each in answer.json()["labels"]] == [1.0, 0.0]
    assert faulty.http.post("/v1/classify", json=body()).status_code == 200


def test_a_stopped_worker_is_replaced_and_loses_nothing(faulty: FakeServer) -> None:
    ready_again(faulty)
    (worker,) = faulty.workers()
    with ThreadPoolExecutor() as pool:
        os.kill(worker, signal.SIGSTOP)
        asked = [pool.submit(faulty.http.post, "/v1/classify", json=body()) for _ in range(4)]
        assert [answer.result().status_code for answer in asked] == [200] * 4
    assert not alive(worker)


def test_a_worker_that_never_starts_is_tried_and_then_the_server_ends() -> None:
    """Clients are told to come back as long as it is tried. Then the process ends, so that the
    orchestrator starts another one."""
    port = free_port()
    command = [*fake_command("CrashingRunner"), "--port", str(port)]
    with (
        subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process,
        httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=PATIENCE) as http,
    ):

        def status(path: str) -> int | None:
            try:
                return http.get(path).status_code
            except httpx.TransportError:
                return None

        try:
            eventually(lambda: status("/livez"))
            assert status("/livez") == 200  # five starts of a process take seconds
            answer = http.post("/v1/classify", json=body())
            assert (answer.status_code, answer.json()["error_type"]) == (503, "not_ready")
            assert int(answer.headers["retry-after"]) >= 1
            assert status("/readyz") == status("/startupz") == 503
            _, log = process.communicate(timeout=PATIENCE)
        finally:
            process.kill()
    assert process.returncode == 1
    assert log.count("worker 0 was lost: exit code 3\n") == 5
    # Anywhere, because a worker that is about to exit may write its own lines among these.
    assert log.count("No worker can be started: exit code 3\n") == 1


# The server.


def test_a_killed_server_leaves_no_worker_and_its_port_is_free_at_once() -> None:
    with FakeServer("EchoRunner") as service:
        workers = service.workers()
        service.process.send_signal(signal.SIGKILL)
        service.process.wait(PATIENCE)
        with pytest.raises(httpx.TransportError):
            service.http.get("/livez")
        with FakeServer("EchoRunner", port=service.port) as again:
            assert again.http.post("/v1/classify", json=body()).status_code == 200
        eventually(lambda: not any(alive(pid) for pid in workers))


def test_sigterm_under_load_answers_each_accepted_request_once_and_exits_cleanly() -> None:
    with FakeServer("slow", max_queue_size=16, drain_timeout_s=20) as service:
        requests = [post_json(body())]
        began = time.monotonic()

        async def load() -> tuple[list[Record], float, int]:
            driving = asyncio.create_task(drive(service.url, steady(60, 2.0), requests))
            await asyncio.sleep(1.0)
            told = time.monotonic()
            service.process.send_signal(signal.SIGTERM)
            status = await asyncio.to_thread(service.process.wait, PATIENCE)
            assert time.monotonic() - told < 20 + SOON
            return await driving, told - began, status

        records, told, status = asyncio.run(load())
    assert status == 0
    # What was on its way at the signal may have been refused already; what was sent clearly before
    # it was either accepted, and then it has its answer, or told at once that the queue was full.
    before = [record for record in records if record.started < told - 0.2]
    assert len(before) > 20
    assert {record.status for record in before} <= {200, 429}
    late = [record for record in before if record.status == 200 and record.ended > told]
    assert len(late) > 5  # those whose answers the signal could have cost
    assert {record.status for record in records} <= {200, 429, 503, None}
    for record in records:
        # Without an answer are only those that came when nobody listened any more.
        assert record.answers == (record.status is not None)
        assert record.status is not None or record.started > told


def test_a_second_signal_ends_it_now() -> None:
    with FakeServer("EchoRunner", drain_timeout_s=600) as service:
        workers = service.workers()
        with ThreadPoolExecutor() as pool:
            hanging = pool.submit(service.http.post, "/v1/classify", json=body("hang"))
            eventually(lambda: "tapt_batch_size_count 1.0" in service.http.get("/metrics").text)
            service.process.send_signal(signal.SIGTERM)
            eventually(lambda: service.http.get("/readyz").status_code == 503)
            assert not hanging.done()
            began = time.monotonic()
            service.process.send_signal(signal.SIGINT)
            service.process.wait(PATIENCE)
            assert time.monotonic() - began < SOON
            with contextlib.suppress(httpx.TransportError):  # cut off, or told so
                assert hanging.result().status_code >= 500
        eventually(lambda: not any(alive(pid) for pid in workers))


@pytest.mark.parametrize("kind", ["slow", "EchoRunner"], ids=["the server's", "its worker's too"])
def test_a_full_disk_under_the_log_harms_nobody(kind: str) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    with open("/dev/full", "w") as sink, FakeServer(kind, stderr=sink) as service:
        for _ in range(5):
            assert service.http.post("/v1/classify", json=body()).status_code == 200
            assert service.http.post("/v1/classify", content=b"{").status_code == 400
        if kind == "EchoRunner":  # its process has a traceback to write
            assert service.http.post("/v1/classify", json=body("raise")).status_code == 500
            assert service.http.post("/v1/classify", json=body()).status_code == 200
        service.process.send_signal(signal.SIGTERM)
        assert service.process.wait(PATIENCE) == 0


def test_the_address_need_not_be_read_by_anybody(tmp_path: Path) -> None:
    """Standard output may be full or closed; the server serves and drains all the same."""
    port = free_port()
    command = [*fake_command("slow"), "--port", str(port)]
    with open("/dev/full", "w") as sink, subprocess.Popen(command, stdout=sink) as process:

        def reachable() -> bool:
            try:
                return httpx.get(f"http://127.0.0.1:{port}/readyz").status_code == 200
            except httpx.TransportError:
                return False

        eventually(reachable)
        answer = httpx.post(f"http://127.0.0.1:{port}/v1/classify", json=body())
        assert answer.status_code == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) == 0


def test_steps_of_the_clock_change_nothing(
    start: Callable[..., Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The wall clock runs wild while requests wait, are adapted and answered."""
    real, steps = time.time, iter(range(1, 10**9))
    wild = lambda: real() + (-1) ** next(steps) * 86_400 * 365  # noqa: E731
    monkeypatch.setattr("time.time", wild)
    monkeypatch.setattr("time.time_ns", lambda: int(wild() * 1e9))
    server = start(FakeWorker(seconds=lambda batch: 0.3), request_timeout_ms=20_000)
    with ThreadPoolExecutor() as pool:
        asked = [pool.submit(server.http.post, "/v1/classify", json=body()) for _ in range(8)]
        answers = [future.result() for future in asked]
    assert [answer.status_code for answer in answers] == [200] * 8
    timings = [answer.json()["timings_ms"] for answer in answers]
    assert all(0 <= value < 20_000 for timing in timings for value in timing.values())
    assert server.http.get("/readyz").status_code == 200


# Clients.


@pytest.fixture(scope="module")
def hasty() -> Iterator[FakeServer]:
    with FakeServer("slow", upload_timeout_ms=500) as service:
        yield service


def cut_off(client: socket.socket, drops: Iterable[bytes], pause: float = 0.05) -> bytes:
    """What a client is told that sends drop by drop, however long: each could begin its time anew.
    Fails unless it is cut off before the drops are used up."""
    client.settimeout(pause)
    for drop in drops:
        with contextlib.suppress(ConnectionError):  # the answer is there, though nobody listens
            client.sendall(drop)
        try:
            return client.recv(1000)
        except ConnectionResetError:
            return b""
        except TimeoutError:
            continue
    raise AssertionError("never cut off")


@pytest.mark.parametrize("sent", [0, 1, None], ids=["nothing", "a byte", "a byte at a time"])
def test_slow_heads_are_not_waited_for(hasty: FakeServer, sent: int | None) -> None:
    """A slow-loris: a connection that brings nothing, or a head a byte at a time."""
    head = b"POST /v1/classify HTTP/1.1\r\nHost: x\r\nX-Long: " + b"x" * 1000
    began = time.monotonic()
    with socket.create_connection(("127.0.0.1", hasty.port)) as client:
        drops = (head[at : at + 1] if sent is None or at < sent else b"" for at in range(len(head)))
        assert cut_off(client, drops) == b""
    assert 0.4 < time.monotonic() - began < 0.5 + SOON


def test_a_slow_body_is_not_waited_for(hasty: FakeServer) -> None:
    head = b"POST /v1/classify HTTP/1.1\r\nHost: x\r\nContent-Length: 5000\r\n\r\n"
    began = time.monotonic()
    with socket.create_connection(("127.0.0.1", hasty.port)) as client:
        client.sendall(head)
        assert cut_off(client, [b"x"] * 1000).startswith(b"HTTP/1.1 408 ")
    assert 0.4 < time.monotonic() - began < 0.5 + SOON


def test_a_slow_head_after_an_answer_is_not_waited_for_either(hasty: FakeServer) -> None:
    with socket.create_connection(("127.0.0.1", hasty.port), timeout=PATIENCE) as client:
        client.sendall(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")
        received = b""
        while not received.endswith(b"}"):
            received += client.recv(1000)
        began = time.monotonic()
        assert cut_off(client, [b"GET /", *[b"x"] * 1000]) == b""
    assert 0.4 < time.monotonic() - began < 0.5 + SOON


def test_an_adaptation_longer_than_the_patience_for_heads_is_answered(
    hasty: FakeServer,
) -> None:
    with ThreadPoolExecutor(24) as pool:
        asked = [pool.submit(hasty.http.post, "/v1/classify", json=body()) for _ in range(24)]
        assert [answer.result().status_code for answer in asked] == [200] * 24


def test_a_thousand_idle_connections_shut_nobody_out() -> None:
    """Under the usual limit of descriptors, lowered here, which the server raises where it may."""
    with FakeServer("slow", limit="ulimit -Sn 256") as service:
        idle = [socket.create_connection(("127.0.0.1", service.port)) for _ in range(1000)]
        try:
            for _ in range(5):
                assert httpx.post(f"{service.url}/v1/classify", json=body()).status_code == 200
                assert httpx.get(f"{service.url}/readyz").status_code == 200
        finally:
            for client in idle:
                client.close()


def test_clients_that_leave_in_the_middle_leave_nothing_behind(
    start: Callable[..., Server],
) -> None:
    """Mid-head, mid-upload, and while they wait; places and bytes are free again."""
    worker = FakeWorker(seconds=lambda batch: 0.05)
    server = start(worker, max_queue_size=4)
    whole = post_json(body())
    for share in (0.1, 0.5, 0.9, 1.0):
        for _ in range(10):
            with socket.create_connection(("127.0.0.1", server.port)) as client:
                client.sendall(whole[: int(len(whole) * share)])
    # Some may not have been accepted yet, and take places for a moment; none may keep one.
    eventually(lambda: server.http.post("/v1/classify", json=body()).status_code == 200)
    intake, engine = server.app.state.intake, server.app.state.engine
    server.wait(
        lambda: intake.uploads.bytes == 0 and engine.queue_depth == 0 and not engine._requests,
        PATIENCE,
    )
