"""Faults injected into the running service, with its model and under load: what its clients saw.

python -m benchmarks.faults --seconds 30

At half of the capacity, open loop, each fault a quarter of the way through. Everybody must be
answered once, with 200, or 429 or 503 and a time to come back, and the service be ready again; only
who was held by an API process that was killed, or came while none listened, may have no answer.
Writes docs/reliability.md; the exit status is 1 where a promise is broken. Faults that need a model
that misbehaves are tests (tests/test_faults.py).
"""

import argparse
import asyncio
import contextlib
import os
import shlex
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from urllib.parse import urlsplit

from benchmarks.load import Service, measure_capacity, photograph
from benchmarks.openloop import Record, drive, steady
from benchmarks.sections import machine, write_section
from models.evaluation.table import tabulate

READY = b"GET /readyz HTTP/1.1\r\nHost: faults\r\nConnection: close\r\n\r\n"
LOOK = 0.05  # seconds between two looks at the readiness
STEADY = 1.0  # seconds of readiness that count as for good
PATIENCE = 120.0  # seconds for it to be ready again
KNOWN = (200, 429, 503)

Fault = Callable[[Service, bytes], AbstractAsyncContextManager[None]]
"""Injected on entry; what it still holds is let go on exit."""


@dataclass(frozen=True, slots=True)
class Trial:
    """What one fault did. `unready`: seconds from the fault until it was ready for good."""

    name: str
    records: list[Record]
    unready: float
    excused: bool

    def count(self, *statuses: int | None) -> int:
        return sum(record.status in statuses for record in self.records)

    @property
    def broken(self) -> list[str]:
        lost, twice = (sum(r.answers == n for r in self.records) for n in (0, 2))
        others = len(self.records) - self.count(*KNOWN, None)
        found = {
            f"{lost} without an answer": lost and not self.excused,
            f"{twice} answered twice": twice,
            f"{others} answered otherwise": others,
            "never ready again": self.unready >= PATIENCE,
        }
        return [f"{self.name}: {what}" for what, holds in found.items() if holds]


@asynccontextmanager
async def kill_worker(service: Service, request: bytes) -> AsyncIterator[None]:
    os.kill(service.workers()[0], signal.SIGKILL)
    yield


@asynccontextmanager
async def stop_worker(service: Service, request: bytes) -> AsyncIterator[None]:
    os.kill(service.workers()[0], signal.SIGSTOP)
    yield


@asynccontextmanager
async def kill_server(service: Service, request: bytes) -> AsyncIterator[None]:
    """And start it again on its port, as whoever watches over it does."""
    await asyncio.to_thread(service.restart)
    yield


@asynccontextmanager
async def leave(service: Service, request: bytes) -> AsyncIterator[None]:
    """Forty clients that go in the middle of their upload or of their wait."""
    for share in (0.1, 0.5, 0.9, 1.0):
        for _ in range(10):
            _, writer = await _connect(service)
            writer.write(request[: int(len(request) * share)])
            with contextlib.suppress(OSError):
                await writer.drain()
            await asyncio.sleep(0.02)
            writer.transport.abort()
    yield


@asynccontextmanager
async def idle(service: Service, request: bytes) -> AsyncIterator[None]:
    """A thousand connections that say nothing."""
    opened = [await _connect(service) for _ in range(1000)]
    yield
    for _, writer in opened:
        writer.transport.abort()


@asynccontextmanager
async def dawdle(service: Service, request: bytes) -> AsyncIterator[None]:
    """A hundred uploads of a few bytes a second."""

    async def one() -> None:
        _, writer = await _connect(service)
        try:
            for at in range(0, len(request), 16):
                writer.write(request[at : at + 16])
                await writer.drain()
                await asyncio.sleep(1)
        except OSError:  # cut off, as it should be
            pass
        finally:
            writer.transport.abort()

    slow = [asyncio.create_task(one()) for _ in range(100)]
    yield
    for task in slow:
        task.cancel()
    await asyncio.gather(*slow, return_exceptions=True)


FAULTS: dict[str, tuple[Fault, bool]] = {
    "worker killed": (kill_worker, False),
    "worker stopped (SIGSTOP)": (stop_worker, False),
    "API process killed, started again": (kill_server, True),
    "40 clients leave in the middle": (leave, False),
    "1,000 idle connections": (idle, False),
    "100 uploads of 16 bytes a second": (dawdle, False),
}
"""Each with whether an answer may be missing."""


async def inject(service: Service, request: bytes, rate: float, seconds: float, name: str) -> Trial:
    """One fault under load."""
    fault, excused = FAULTS[name]
    driving = asyncio.create_task(drive(service.url, steady(rate, seconds), [request]))
    await asyncio.sleep(seconds / 4)
    watching = asyncio.create_task(watch(service, driving))
    async with fault(service, request):
        records, unready = await asyncio.gather(driving, watching)
    return Trial(name, records, unready, excused)


async def watch(service: Service, driving: asyncio.Task[list[Record]]) -> float:
    """Seconds from now until the service is ready for good, looked at while the load lasts."""
    began = last = time.monotonic()
    while last - began < PATIENCE and not (driving.done() and time.monotonic() > last + STEADY):
        (look,) = await drive(service.url, [0.0], [READY])
        if look.status != 200:
            last = time.monotonic()
        await asyncio.sleep(LOOK)
    return last - began


async def _connect(service: Service) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    address = urlsplit(service.url)
    return await asyncio.open_connection(address.hostname, address.port)


def tell(trials: list[Trial]) -> str:
    rows = []
    for trial in trials:
        answered = [r.latency for r in trial.records if r.status == 200]
        rows.append(
            (
                trial.name,
                str(len(trial.records)),
                *(str(trial.count(status)) for status in (*KNOWN, None)),
                str(sum(record.answers == 2 for record in trial.records)),
                f"{max(answered, default=0.0):.1f}",
                f"{trial.unready:.1f}",
            )
        )
    heads = ("fault", "sent", "200", "429", "503", "no answer", "twice", "slowest s", "not ready s")
    return tabulate(heads, rows)


async def run(service: Service, seconds: float) -> tuple[list[Trial], float]:
    request = photograph()
    capacity = await measure_capacity(service, request, seconds)
    return [
        await inject(service, request, capacity / 2, seconds, name) for name in FAULTS
    ], capacity


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=30.0, help="of load for each fault")
    parser.add_argument("--dry", action="store_true", help="do not write docs/reliability.md")
    options = parser.parse_args()
    command = f"python -m benchmarks.faults {shlex.join(a for a in sys.argv[1:] if a != '--dry')}"
    service = Service(["--log-format", "json"])
    try:
        trials, capacity = asyncio.run(run(service, options.seconds))
    finally:
        service.stop()
    broken = [what for trial in trials for what in trial.broken]
    verdict = "Broken: " + "; ".join(broken) + "." if broken else "Every promise above held."
    text = (
        f"{tell(trials)}\n\n{verdict} Load: {capacity / 2:.2f} requests a second, half of the "
        f"capacity, for {options.seconds:g} s each. {machine()} Written by `{command.strip()}`."
    )
    print(text)
    if not options.dry:
        write_section("faults", text)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
