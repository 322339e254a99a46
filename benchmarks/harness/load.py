"""Load on a server: open loop, at fixed times, and closed loop, as fast as it answers.

In an open loop every request is sent at its time, whether or not earlier ones were answered. The
clients of a closed loop wait for an answer before they ask again: they slow down with the server
and hide what an overload does to it ("coordinated omission"). Latencies of an open loop count from
the scheduled time. Each of its requests has a connection of its own, read to its end, so that a
second answer would be seen.
"""

import asyncio
import itertools
import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self
from urllib.parse import urlsplit

import httpx

LATE = 120.0  # seconds after which a request counts as unanswered


@dataclass(frozen=True, slots=True)
class Record:
    """One request of an open loop. Times are seconds after the beginning of the run.

    `answers` counts the complete HTTP answers on its connection: 1 is right, 0 is a lost request,
    2 one that was answered twice. `status` and `retry_after` (seconds) are those of the first.
    """

    scheduled: float
    started: float
    ended: float
    status: int | None
    retry_after: float | None
    answers: int

    @property
    def latency(self) -> float:
        """Seconds from the scheduled time to the last byte of the answer."""
        return self.ended - self.scheduled


def steady(rate: float, seconds: float) -> list[float]:
    """Evenly spaced arrival times, `rate` a second."""
    return [i / rate for i in range(round(rate * seconds))]


def poisson(rate: float, seconds: float, seed: int) -> list[float]:
    """Arrival times of independent clients, `rate` a second on average."""
    draw = random.Random(seed)
    times, now = [], draw.expovariate(rate)
    while now < seconds:
        times.append(now)
        now += draw.expovariate(rate)
    return times


async def drive(url: str, arrivals: Sequence[float], requests: Sequence[bytes]) -> list[Record]:
    """Send `requests`, in turn, at `arrivals` (seconds from now); a record for each arrival."""
    began = time.monotonic()

    async def ask(scheduled: float, request: bytes) -> Record:
        await asyncio.sleep(began + scheduled - time.monotonic())
        return await _ask(url, request, began, scheduled)

    asked = (ask(at, requests[i % len(requests)]) for i, at in enumerate(arrivals))
    return list(await asyncio.gather(*asked))


async def drive_closed(
    url: str, requests: Sequence[bytes], clients: int, seconds: float
) -> list[Record]:
    """Let clients send `requests`, in turn, each as soon as its last one is answered; a record for
    each request. After `seconds` none is sent, and those under way are waited for."""
    began = time.monotonic()
    turns = itertools.cycle(requests)

    async def ask() -> list[Record]:
        records = []
        while (now := time.monotonic() - began) < seconds:
            records.append(await _ask(url, next(turns), began, now))
        return records

    asked = await asyncio.gather(*(ask() for _ in range(clients)))
    return [record for records in asked for record in records]


async def _ask(url: str, request: bytes, began: float, scheduled: float) -> Record:
    address = urlsplit(url)
    started = time.monotonic() - began
    try:
        async with asyncio.timeout(LATE):
            received = await _exchange(address.hostname or "127.0.0.1", address.port or 80, request)
    except (OSError, TimeoutError):
        received = b""
    statuses = _parse(received)
    status, retry_after = statuses[0] if statuses else (None, None)
    ended = time.monotonic() - began
    return Record(scheduled, started, ended, status, retry_after, len(statuses))


async def _exchange(host: str, port: int, request: bytes) -> bytes:
    reader, writer = await asyncio.open_connection(host, port)
    try:
        writer.write(request)
        return await reader.read(-1)
    finally:
        writer.transport.abort()


def _parse(received: bytes) -> list[tuple[int, float | None]]:
    """Status and Retry-After of every complete answer."""
    found = []
    while received.startswith(b"HTTP/1.1 "):
        head, _, rest = received.partition(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        headers = {
            name.lower(): value for name, _, value in (line.partition(": ") for line in lines)
        }
        length = int(headers.get("content-length", 0))
        if len(rest) < length:
            break
        retry = headers.get("retry-after")
        found.append((int(first.split()[1]), None if retry is None else float(retry)))
        received = rest[length:]
    return found


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` of the values do not exceed; NaN of none."""
    ordered = sorted(values)
    if not ordered:
        return float("nan")
    return ordered[min(len(ordered) - 1, max(0, -int(-share * len(ordered) // 1) - 1))]


def summarize(records: Sequence[Record]) -> dict[str, Any]:
    """Throughput and latencies of the answers, and how many requests got none."""
    good = [record for record in records if record.status == 200]
    span = max((record.ended for record in good), default=0.0)
    span -= min((record.scheduled for record in records), default=0.0)
    latencies = [record.latency for record in good]
    return {
        "sent": len(records),
        "answered": len(good),
        "refused": sum(record.status == 429 for record in records),
        "failed": sum(record.status not in (200, 429) for record in records),
        "throughput": len(good) / span if span > 0 else 0.0,
        **{f"p{p}": percentile(latencies, p / 100) for p in (50, 95, 99)},
    }


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer to a closed loop. Status 0: there was none, and `text` is the error."""

    status: int
    seconds: float
    text: str


class ClosedLoop:
    """Clients that post one JSON body to `/v1/classify` over and over until `stop`.

    Each waits for its answer before it asks again. `answers` grows meanwhile. As a context manager
    it stops on exit.
    """

    def __init__(self, connect: Callable[[], httpx.Client], body: object, clients: int) -> None:
        self.answers: list[Answer] = []
        self._connect, self._body = connect, body
        self._stopping = threading.Event()
        self._threads = [threading.Thread(target=self._ask) for _ in range(clients)]
        for thread in self._threads:
            thread.start()

    def _ask(self) -> None:
        with self._connect() as http:
            while not self._stopping.is_set():
                began = time.monotonic()
                try:
                    answer = http.post("/v1/classify", json=self._body)
                    status, text = answer.status_code, answer.text
                except httpx.HTTPError as error:
                    status, text = 0, repr(error)
                self.answers.append(Answer(status, time.monotonic() - began, text))

    def stop(self) -> None:
        """Wait for the answers that are still due."""
        self._stopping.set()
        for thread in self._threads:
            thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def measure_capacity(url: str, body: object, seconds: float) -> float:
    """Answers a second in a closed loop, with the queue never empty and never full."""

    def connect() -> httpx.Client:
        return httpx.Client(base_url=url, timeout=LATE)

    with connect() as http:
        limits = http.get("/info").json()["limits"]
    clients = min(2 * limits["max_batch_size"], limits["max_queue_size"])

    def measure(seconds: float) -> float:
        began = time.monotonic()
        with ClosedLoop(connect, body, clients) as loop:
            time.sleep(seconds)
        good = sum(answer.status == 200 for answer in loop.answers)
        return good / (time.monotonic() - began)

    measure(seconds / 4)  # caches fill, and the server learns how long a request takes
    return measure(seconds)
