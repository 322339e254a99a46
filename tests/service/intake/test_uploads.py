"""The memory for unfinished bodies is bounded, and who holds it idly loses it first."""

import asyncio
import base64
import contextlib
import json
import socket
import time
from collections.abc import Callable

import httpx
import pytest

from service.errors import QueueFull, UploadTimeout
from service.http.authentication import entry
from service.http.connections import MAX_CONNECTIONS
from service.intake.uploads import CAPACITY, MAX_UPLOADS, Upload, Uploads
from service.telemetry.metrics import Metrics
from tests.conftest import Server

pytestmark = pytest.mark.alone

START = Callable[..., Server]
LIMIT = 2**20


def evicted(capacity: int, *uploads: tuple[str, int, float]) -> list[int]:
    """Which uploads are evicted by the last, each of a caller, of so many bytes and so old."""
    now = 1000.0

    async def scenario() -> list[int]:
        metrics = Metrics()
        nonlocal now
        all_of_them = Uploads(capacity, metrics, lambda: now)
        begun: list[Upload] = []
        gone: list[int] = []

        async def hold(number: int, caller: str, size: int) -> None:
            try:
                async with all_of_them.receive(caller, 60) as upload:
                    begun.append(upload)
                    upload.grow(size)
                    await asyncio.sleep(60)
            except QueueFull:
                gone.append(number)

        tasks = []
        for number, (caller, size, age) in enumerate(uploads):
            now = 1000.0 - age
            tasks.append(asyncio.create_task(hold(number, caller, size)))
            await asyncio.sleep(0)
            now = 1000.0
        await asyncio.sleep(0.01)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert all_of_them.bytes == 0
        counted = metrics.registry.get_sample_value("tapt_rejected_total", {"reason": "uploads"})
        assert (counted or 0) == len(gone)
        return gone

    return asyncio.run(scenario())


def test_while_there_is_room_nobody_is_evicted() -> None:
    assert evicted(100, ("a", 50, 9), ("a", 50, 0)) == []


def test_the_newcomer_stays_and_the_largest_goes() -> None:
    assert evicted(100, ("a", 30, 9), ("a", 60, 9), ("a", 20, 0)) == [1]


def test_of_two_alike_the_slower_goes() -> None:
    assert evicted(100, ("a", 50, 1), ("a", 50, 20), ("a", 5, 0)) == [1]


def test_the_caller_that_holds_the_most_pays() -> None:
    assert evicted(100, ("b", 40, 20), ("a", 30, 1), ("a", 25, 9), ("c", 10, 0)) == [2]
    assert evicted(100, ("b", 40, 20), ("a", 60, 1), ("b", 10, 0)) == [1]


def test_as_many_go_as_must() -> None:
    assert evicted(100, *[("a", 10, 9 - i) for i in range(10)], ("b", 35, 0)) == [0, 1, 2, 3]


def test_one_that_does_not_fit_by_itself_goes() -> None:
    assert evicted(100, ("a", 101, 0)) == [0]


def test_uploads_are_bounded_in_number_too() -> None:
    """Slow ones that have brought hardly anything could hold every connection."""
    many = [("a", 1, 9 + i) for i in range(MAX_UPLOADS)]
    assert evicted(10 * MAX_UPLOADS, *many) == []
    assert evicted(10 * MAX_UPLOADS, *many, ("b", 1, 0)) == [MAX_UPLOADS - 1]
    assert MAX_UPLOADS < MAX_CONNECTIONS


def test_an_upload_ends_at_its_time() -> None:
    async def scenario() -> None:
        with pytest.raises(UploadTimeout):
            async with Uploads(10, Metrics()).receive("a", 0.01):
                await asyncio.sleep(10)

    asyncio.run(scenario())


def test_idle_uploads_of_one_key_shut_no_other_out(start: START, photo: bytes) -> None:
    server = start(
        api_keys=",".join([entry("idle"), entry("busy")]),
        max_body_bytes=LIMIT,
        upload_timeout_ms=30_000,
    )
    head = (
        b"POST /v1/classify HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer idle\r\n"
        b"Content-Length: %d\r\n\r\n" % LIMIT
    )
    body = {"image": base64.b64encode(photo).decode(), "candidate_labels": ["a", "b"]}
    with contextlib.ExitStack() as stack:
        idle = []
        for _ in range(CAPACITY):
            client = stack.enter_context(socket.create_connection(("127.0.0.1", server.port)))
            client.sendall(head + b"x" * (LIMIT - 1))
            idle.append(client)
        uploads = server.app.state.intake.uploads
        server.wait(lambda: uploads.bytes == CAPACITY * (LIMIT - 1))
        began = time.monotonic()
        for _ in range(5):
            answer = server.http.post(
                "/v1/classify", json=body, headers={"Authorization": "Bearer busy"}
            )
            assert answer.status_code == 200, answer.text
        assert time.monotonic() - began < 10
        # Its own are told why, the oldest first.
        idle[0].settimeout(10)
        told = idle[0].recv(65536)
        assert told.startswith(b"HTTP/1.1 429 ")
        assert b"\r\nretry-after: 1\r\n" in told.lower()
        assert uploads.bytes <= CAPACITY * LIMIT
    server.wait(lambda: uploads.bytes == 0)


def test_without_keys_a_small_upload_gets_through_between_large_idle_ones(
    start: START, photo: bytes
) -> None:
    server = start(max_body_bytes=LIMIT)
    head = b"POST /v1/classify HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % LIMIT
    body = json.dumps({"image": base64.b64encode(photo).decode(), "candidate_labels": ["a", "b"]})
    with contextlib.ExitStack() as stack:
        for _ in range(CAPACITY):
            client = stack.enter_context(socket.create_connection(("127.0.0.1", server.port)))
            client.sendall(head + b"x" * (LIMIT - 1))
        uploads = server.app.state.intake.uploads
        server.wait(lambda: uploads.bytes == CAPACITY * (LIMIT - 1))
        assert httpx.post(f"{server.url}/v1/classify", content=body).status_code == 200
