"""Open-loop load: every request goes out at its instant, whether or not earlier ones were answered.

A closed loop, whose clients wait for an answer before they ask again, slows down together with
the server and hides what an overload does to it ("coordinated omission"). Latencies here count
from the scheduled instant. Each request has a connection of its own, read to its end, so that a
second answer would be seen.
"""

import asyncio
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

LATE = 120.0  # seconds after which a request counts as unanswered


@dataclass(frozen=True, slots=True)
class Record:
    """One request. Instants are seconds after the run's beginning.

    `answers` counts the whole HTTP answers on its connection: 1 is right, 0 is a request that was
    lost, 2 one that was answered twice. `status` and `retry_after` (seconds) are the first one's.
    """

    scheduled: float
    started: float
    ended: float
    status: int | None
    retry_after: float | None
    answers: int

    @property
    def latency(self) -> float:
        """Seconds from the scheduled instant to the answer's last byte."""
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


def post(path: str, body: bytes, content_type: str = "application/json", key: str = "") -> bytes:
    """A whole HTTP request, to be sent as it is."""
    lines = [
        f"POST {path} HTTP/1.1",
        "Host: load",
        "Connection: close",
        f"Content-Type: {content_type}",
        f"Content-Length: {len(body)}",
        *([f"Authorization: Bearer {key}"] if key else []),
    ]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


async def drive(url: str, arrivals: Sequence[float], requests: Sequence[bytes]) -> list[Record]:
    """Send `requests`, in turn, at `arrivals` (seconds from now); a record for each arrival."""
    began = time.monotonic()
    address = urlsplit(url)
    host, port = address.hostname or "127.0.0.1", address.port or 80

    async def ask(scheduled: float, request: bytes) -> Record:
        await asyncio.sleep(began + scheduled - time.monotonic())
        started = time.monotonic() - began
        try:
            async with asyncio.timeout(LATE):
                received = await _exchange(host, port, request)
        except (OSError, TimeoutError):
            received = b""
        statuses = _parse(received)
        status, retry_after = statuses[0] if statuses else (None, None)
        ended = time.monotonic() - began
        return Record(scheduled, started, ended, status, retry_after, len(statuses))

    asked = (ask(at, requests[i % len(requests)]) for i, at in enumerate(arrivals))
    return list(await asyncio.gather(*asked))


async def _exchange(host: str, port: int, request: bytes) -> bytes:
    reader, writer = await asyncio.open_connection(host, port)
    try:
        writer.write(request)
        return await reader.read(-1)
    finally:
        writer.transport.abort()


def _parse(received: bytes) -> list[tuple[int, float | None]]:
    """Status and Retry-After of every whole answer."""
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
