"""Inject faults into the running service under load, and count what its clients get.

python -m benchmarks.faults --seconds 30

The load is half of the capacity, open loop; a fault comes after a quarter of it. Every request must
get one answer, 200, or 429 or 503 with Retry-After, and the service must become ready again. Only
requests that a killed API process held, or that came before it was restarted, may get no answer.
Slow uploads are cut off at a limit that is short on the server of that trial. Writes
docs/reliability.md; the exit status is 1 if a promise is broken. Faults that need a misbehaving
model are tests (tests/service/test_faults.py).
"""

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field

from benchmarks.harness.load import Record, drive, measure_capacity, steady
from benchmarks.harness.machine import machine
from benchmarks.harness.report import command_line, make_parser, write_section
from benchmarks.harness.requests import photograph, post_json
from benchmarks.harness.server import Server
from models.evaluation.table import tabulate

READY = b"GET /readyz HTTP/1.1\r\nHost: faults\r\nConnection: close\r\n\r\n"
POLL_SECONDS = 0.05  # seconds between two looks at the readiness
STEADY_SECONDS = 1.0  # seconds of readiness that count as for good
PATIENCE = 120.0  # seconds for it to be ready again
KNOWN = (200, 429, 503)
KNOBS = ["--log-format", "json"]
UPLOAD_SECONDS = 5.0  # the limit of the server that slow uploads meet
LATE = 5.0  # seconds after which an upload is not cut off by that limit any more


@dataclass(slots=True)
class Effect:
    """What a fault did that the clients of the load cannot see. Times are of the monotonic clock.

    `outage`: from the kill of the API process until the next one listened. `slow`: uploads that
    outlast the limit; `cut`: after how many seconds each was answered 408.
    """

    outage: tuple[float, float] | None = None
    slow: int = 0
    cut: list[float] = field(default_factory=list)


Fault = Callable[[Server, bytes], AbstractAsyncContextManager[Effect]]
"""Injected on entry and cleaned up on exit, when its effect is complete."""


@dataclass(frozen=True, slots=True)
class Trial:
    """What one fault did. `unready`: seconds from the fault until the service stayed ready.
    `began`: when the load and the times of its records began, on the clock of the effect."""

    name: str
    records: list[Record]
    unready: float
    effect: Effect
    began: float = 0.0

    def count(self, *statuses: int | None) -> int:
        return sum(record.status in statuses for record in self.records)

    @property
    def twice(self) -> int:
        return sum(record.answers > 1 for record in self.records)

    def may_be_lost(self, record: Record) -> bool:
        """Whether the killed process held it, or it came while none listened."""
        if self.effect.outage is None:
            return False
        killed, listened = (instant - self.began for instant in self.effect.outage)
        return record.ended >= killed and record.started < listened

    @property
    def broken(self) -> list[str]:
        lost = sum(r.answers == 0 and not self.may_be_lost(r) for r in self.records)
        others = len(self.records) - self.count(*KNOWN, None)
        untold = sum(r.status in (429, 503) and r.retry_after is None for r in self.records)
        uncut = self.effect.slow - len(self.effect.cut)
        found = {
            f"{lost} without an answer": lost,
            f"{self.twice} answered twice": self.twice,
            f"{others} answered otherwise": others,
            f"{untold} refused and not told when to come back": untold,
            f"{uncut} slow uploads not cut off": uncut,
            "never ready again": self.unready >= PATIENCE,
        }
        return [f"{self.name}: {what}" for what, holds in found.items() if holds]


@asynccontextmanager
async def kill_worker(service: Server, request: bytes) -> AsyncIterator[Effect]:
    os.kill(service.workers()[0], signal.SIGKILL)
    yield Effect()


@asynccontextmanager
async def stop_worker(service: Server, request: bytes) -> AsyncIterator[Effect]:
    os.kill(service.workers()[0], signal.SIGSTOP)
    yield Effect()


@asynccontextmanager
async def kill_server(service: Server, request: bytes) -> AsyncIterator[Effect]:
    """And start it again on its port, as a process manager does."""
    killed = time.monotonic()
    await asyncio.to_thread(service.restart)
    yield Effect(outage=(killed, service.ready_at))


@asynccontextmanager
async def clients_leave(service: Server, request: bytes) -> AsyncIterator[Effect]:
    """Forty clients that disconnect during their upload or while they wait."""
    for share in (0.1, 0.5, 0.9, 1.0):
        for _ in range(10):
            _, writer = await _connect(service)
            writer.write(request[: int(len(request) * share)])
            with contextlib.suppress(OSError):
                await writer.drain()
            await asyncio.sleep(0.02)
            writer.transport.abort()
    yield Effect()


@asynccontextmanager
async def idle_connections(service: Server, request: bytes) -> AsyncIterator[Effect]:
    """A thousand connections that send nothing."""
    opened = [await _connect(service) for _ in range(1000)]
    yield Effect()
    for _, writer in opened:
        writer.transport.abort()


@asynccontextmanager
async def slow_uploads(service: Server, request: bytes) -> AsyncIterator[Effect]:
    """A hundred uploads of 16 bytes a second, after a complete head."""
    effect = Effect(slow=100)
    body = request.index(b"\r\n\r\n") + 4

    async def one() -> None:
        reader, writer = await _connect(service)
        began = time.monotonic()
        writer.write(request[:body])
        answer = asyncio.create_task(reader.read(-1))
        try:
            for at in range(body, len(request), 16):
                writer.write(request[at : at + 16])
                await asyncio.wait([answer], timeout=1)
                if answer.done():
                    break
            if (await answer).startswith(b"HTTP/1.1 408 "):
                effect.cut.append(time.monotonic() - began)
        except OSError:  # cut off without a word, which is not what is promised
            pass
        finally:
            answer.cancel()
            writer.transport.abort()

    slow = [asyncio.create_task(one()) for _ in range(effect.slow)]
    until = time.monotonic() + UPLOAD_SECONDS + LATE
    yield effect
    await asyncio.wait(slow, timeout=max(0.0, until - time.monotonic()))
    for task in slow:
        task.cancel()
    await asyncio.gather(*slow, return_exceptions=True)


FAULTS: dict[str, tuple[Fault, list[str]]] = {
    "worker killed": (kill_worker, []),
    "worker stopped (SIGSTOP)": (stop_worker, []),
    "API process killed, started again": (kill_server, []),
    "40 clients leave in the middle": (clients_leave, []),
    "1,000 idle connections": (idle_connections, []),
    "100 uploads of 16 bytes a second": (
        slow_uploads,
        ["--upload-timeout-ms", f"{UPLOAD_SECONDS * 1000:.0f}"],
    ),
}
"""Each with the knobs of its server, if it needs a server of its own."""


async def inject(service: Server, request: bytes, rate: float, seconds: float, name: str) -> Trial:
    """One fault under load."""
    fault, _ = FAULTS[name]
    driving = asyncio.create_task(drive(service.url, steady(rate, seconds), [request]))
    await asyncio.sleep(0)  # it begins
    began = time.monotonic()
    await asyncio.sleep(seconds / 4)
    watching = asyncio.create_task(time_unready(service, driving))
    async with fault(service, request) as effect:
        records, unready = await asyncio.gather(driving, watching)
    return Trial(name, records, unready, effect, began)


async def time_unready(service: Server, driving: asyncio.Task[list[Record]]) -> float:
    """Seconds from now until the service stays ready, polled while the load lasts."""
    began = last = time.monotonic()
    while last - began < PATIENCE and not (
        driving.done() and time.monotonic() > last + STEADY_SECONDS
    ):
        (look,) = await drive(service.url, [0.0], [READY])
        if look.status != 200:
            last = time.monotonic()
        await asyncio.sleep(POLL_SECONDS)
    return last - began


async def _connect(service: Server) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_connection("127.0.0.1", service.port)


def render(trials: list[Trial]) -> str:
    rows = []
    for trial in trials:
        answered = [r.latency for r in trial.records if r.status == 200]
        rows.append(
            (
                trial.name,
                str(len(trial.records)),
                *(str(trial.count(status)) for status in (*KNOWN, None)),
                str(trial.twice),
                f"{max(answered, default=0.0):.1f}",
                f"{trial.unready:.1f}",
            )
        )
    heads = ("fault", "sent", "200", "429", "503", "no answer", "twice", "slowest s", "not ready s")
    text = tabulate(heads, rows)
    for trial in trials:
        if slow := trial.effect.slow:
            cut = trial.effect.cut
            last = f", the last after {max(cut):.1f} s" if cut else ""
            text += (
                f"\n\n{len(cut)} of the {slow} slow uploads were cut off with 408{last}; the "
                f"upload timeout in that trial is {UPLOAD_SECONDS:g} s."
            )
    return text


def run(seconds: float) -> tuple[list[Trial], float]:
    """Every trial, and the capacity; the load of each is half of it."""
    request = post_json(photograph())
    trials = []
    with Server(*KNOBS) as service:
        capacity = measure_capacity(service.url, photograph(), seconds)
        for name, (_, knobs) in FAULTS.items():
            if not knobs:
                trials.append(asyncio.run(inject(service, request, capacity / 2, seconds, name)))
    for name, (_, knobs) in FAULTS.items():
        if knobs:
            with Server(*KNOBS, *knobs) as service:
                measure_capacity(service.url, photograph(), seconds / 4)  # warm, as the others
                trials.append(asyncio.run(inject(service, request, capacity / 2, seconds, name)))
    return trials, capacity


def main() -> int:
    parser = make_parser("benchmarks.faults", __doc__)
    parser.add_argument("--seconds", type=float, default=30.0, help="of load for each fault")
    parser.add_argument("--dry", action="store_true", help="do not write docs/reliability.md")
    options = parser.parse_args()
    trials, capacity = run(options.seconds)
    broken = [what for trial in trials for what in trial.broken]
    verdict = "Broken: " + "; ".join(broken) + "." if broken else "Every promise above held."
    text = (
        f"{render(trials)}\n\n{verdict} Load: {capacity / 2:.2f} requests a second, half of the "
        f"capacity, for {options.seconds:g} s each. {machine()} "
        f"Written by `{command_line('benchmarks.faults')}`."
    )
    print(text)
    if not options.dry:
        write_section("faults", text)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
