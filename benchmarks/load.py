"""Overload and endurance of the running service, and whether what is promised of them holds.

python -m benchmarks.load --seconds 60          # 0.5x, 1x, 2x, 10x of the measured capacity
python -m benchmarks.load --soak 30             # minutes at 0.8x: the slope of the memory
python -m benchmarks.load ... -- --workers 2    # knobs of the server after the dashes

Open loop, on a server of its own. Every request has one answer; the accepted ones' 99th percentile
stays below queue / throughput + one batch; who is refused is told when to come back; of those who
wait as long as Retry-After says, and come when nobody else does, 95% are let in; over a soak no
process is lost and memory does not grow. The exit status is 1 where one of these is broken or could
not be seen.
"""

import argparse
import asyncio
import base64
import io
import json
import re
import shlex
import subprocess
import sys
import time
import urllib.request
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from PIL import Image
from skimage import data

from benchmarks.openloop import Record, drive, post, steady
from benchmarks.sections import machine, write_section

LOADS = (0.5, 1.0, 2.0, 10.0)
SOAK_LOAD = 0.8
WARM_UP = 0.2  # share of a soak that is not looked at
FLAT = 10.0  # MiB an hour that count as flat; a short soak still sees the warm-up, and fails
RETRIED = 0.95  # share of the refused that must be let in at their first retry
LABELS = ["cat", "dog", "espresso", "school bus", "lemon"]


@dataclass(frozen=True, slots=True)
class Phase:
    """One load, and those of its refused clients who came back when it was over."""

    factor: float
    records: list[Record]
    retries: list[Record]

    def count(self, *statuses: int | None) -> int:
        return sum(record.status in statuses for record in self.records)

    @property
    def single(self) -> bool:
        """Whether every request had exactly one answer."""
        return all(record.answers == 1 for record in [*self.records, *self.retries])

    @property
    def untold(self) -> int:
        """Those that were refused and not told when to come back."""
        asked = [*self.records, *self.retries]
        return sum(record.status == 429 and record.retry_after is None for record in asked)

    @property
    def latencies(self) -> list[float]:
        """Seconds, of the accepted ones."""
        return [r.latency for r in self.records if r.status == 200] or [0.0]

    @property
    def throughput(self) -> float:
        """Answers a second, from the first arrival to the last answer."""
        return self.count(200) / max(r.ended for r in self.records)

    @property
    def let_in(self) -> float | None:
        """Share of the retries that were accepted."""
        if not self.retries:
            return None
        return sum(record.status == 200 for record in self.retries) / len(self.retries)


class Service:
    """`tapt-serve serve` with its knobs, ready."""

    def __init__(self, knobs: list[str]) -> None:
        self._knobs = knobs
        self._start(0)

    def _start(self, port: int) -> None:
        serve = [sys.executable, "-m", "service.cli", "serve"]
        command = [*serve, "--port", str(port), *self._knobs]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        assert self.process.stdout is not None
        found = re.search(r"http://\S+", self.process.stdout.readline())
        if found is None:
            raise SystemExit("the service did not start")
        self.listening = time.monotonic()
        self.url = found.group()
        with urllib.request.urlopen(f"{self.url}/info") as answer:
            self.info: dict[str, Any] = json.load(answer)

    def memory(self) -> tuple[float, float]:
        """Resident MiB of the API process, and of its workers together."""
        rows, pid = _processes(), self.process.pid
        own = sum(rss for child, _, rss, _ in rows if child == pid)
        return own / 1024, sum(rss for _, parent, rss, _ in rows if parent == pid) / 1024

    def workers(self) -> list[int]:
        """The pids of the worker processes."""
        pid = self.process.pid
        return [
            child for child, parent, _, how in _processes() if parent == pid and "spawn_main" in how
        ]

    def pids(self) -> list[int]:
        """Of the API process, if it runs, and of its workers."""
        own = [self.process.pid] if self.process.poll() is None else []
        return own + sorted(self.workers())

    def restart(self) -> None:
        """Kill the API process, and start another one at the same address."""
        self.process.kill()
        self.process.wait()
        self._start(urlsplit(self.url).port or 0)

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(60)


def _processes() -> list[tuple[int, int, int, str]]:
    """Of every process: its pid, its parent's, resident KiB, and its command."""
    command = ["ps", "-A", "-o", "pid=,ppid=,rss=,args="]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    rows = (line.split(maxsplit=3) for line in listed.splitlines())
    return [(int(pid), int(parent), int(rss), how) for pid, parent, rss, how in rows]


async def measure_capacity(service: Service, request: bytes, seconds: float) -> float:
    """Answers a second with the queue never empty and never full."""
    limits = service.info["limits"]
    clients = min(2 * limits["max_batch_size"], limits["max_queue_size"])

    async def client(until: float) -> int:
        answered = 0
        while time.monotonic() < until:
            (record,) = await drive(service.url, [0.0], [request])
            answered += record.status == 200
        return answered

    async def everybody(seconds: float) -> float:
        began = time.monotonic()
        until = began + seconds
        answered = sum(await asyncio.gather(*(client(until) for _ in range(clients))))
        return answered / (time.monotonic() - began)

    await everybody(seconds / 4)  # caches fill, and the server learns how long a request takes
    return await everybody(seconds)


async def load(
    service: Service, request: bytes, rate: float, factor: float, seconds: float
) -> Phase:
    """Offer `factor` times the rate, then let the refused come back when they were told to."""
    records = await drive(service.url, steady(rate * factor, seconds), [request])
    over = max(record.ended for record in records)
    returns = [
        record.ended + record.retry_after - over
        for record in records
        if record.status == 429 and record.retry_after is not None
    ]
    returns = sorted(instant for instant in returns if instant > 0)
    return Phase(factor, records, await drive(service.url, returns, [request]))


async def soak(
    service: Service, request: bytes, rate: float, seconds: float
) -> tuple[Phase, list[tuple[float, float, float]]]:
    """A load below capacity, and (hours, MiB of the API, MiB of the workers) meanwhile."""
    began, samples = time.monotonic(), []
    driving = asyncio.create_task(drive(service.url, steady(rate * SOAK_LOAD, seconds), [request]))
    while not driving.done():
        now = time.monotonic() - began
        if now > WARM_UP * seconds:
            samples.append((now / 3600, *service.memory()))
        await asyncio.wait([driving], timeout=max(0.2, seconds / 300))
    return Phase(SOAK_LOAD, await driving, []), samples


def tell_soak(phase: Phase, minutes: float, same: bool) -> tuple[list[str], list[str]]:
    """What a soak's clients met, and the promises that were broken. `same`: the processes at its
    end are those of its beginning."""
    others = len(phase.records) - phase.count(200, 429)
    found = {
        "a request had no answer, or two": not phase.single,
        f"{others} requests met neither 200 nor 429": others,
        f"{phase.untold} were refused and not told when to come back": phase.untold,
        "the API process or a worker was lost": not same,
    }
    line = (
        f"- {len(phase.records)} requests at {phase.factor:g}x for {minutes:g} minutes: "
        f"{phase.count(200)} answered 200, {phase.count(429)} 429, {others} other; the slopes "
        f"leave out the first {WARM_UP:.0%}"
    )
    return [line], [what for what, holds in found.items() if holds]


def tell_slope(name: str, hours: np.ndarray, mib: np.ndarray) -> tuple[str, list[str]]:
    """The memory's slope with the straight line's standard error, and whether it is too steep."""
    line, spread = np.polyfit(hours, mib, 1, cov=True)
    steep, error = line[0], spread[0, 0] ** 0.5
    told = f"{steep:+.1f} ± {error:.1f} MiB an hour (at the end {mib[-1]:.0f} MiB)"
    grows = steep - 2 * error > FLAT
    return f"- {name}: {told}", [f"the memory of the {name} grows"] if grows else []


def tell_load(
    phases: list[Phase], capacity: float, queue: int, batch: int
) -> tuple[list[str], list[str]]:
    """The table's lines, and the promises that were broken.

    Where the queue overflows, the pace is what was measured there: client and server share the
    machine, and refusing takes time too. Below that the pace is the clients', not the server's.

    Refusals of which nobody's turn came after the load prove nothing of Retry-After. Where the load
    is not above the capacity they may be few and early, and another load's returns suffice.
    """
    lines = [
        "| load | sent | 200 | 429 | other | no answer or two | answers/s "
        "| p50 s | p99 s | p99 limit s | retried | retries admitted |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    broken = []
    returned = any(phase.retries for phase in phases)
    for phase in phases:
        p50, p99 = np.percentile(phase.latencies, [50, 99])
        pace = phase.throughput if phase.count(429) else capacity
        bound = (queue + batch) / pace
        odd = sum(record.answers != 1 for record in [*phase.records, *phase.retries])
        others = len(phase.records) - phase.count(200, 429)
        share = "" if phase.let_in is None else f"{phase.let_in:.0%}"
        lines.append(
            f"| {phase.factor:g}x | {len(phase.records)} | {phase.count(200)} | {phase.count(429)} "
            f"| {others} | {odd} | {phase.throughput:.2f} | {p50:.2f} | {p99:.2f} | {bound:.2f} "
            f"| {len(phase.retries)} | {share} |"
        )
        name = f"at {phase.factor:g}x"
        if not phase.single:
            broken.append(f"{name}: {odd} requests had no answer, or two")
        if others:
            broken.append(f"{name}: {others} requests met neither 200 nor 429")
        if p99 > bound:
            broken.append(f"{name}: p99 {p99:.2f} s is above {bound:.2f} s")
        if phase.untold:
            broken.append(f"{name}: {phase.untold} were refused and not told when to come back")
        if phase.count(429) and not phase.retries and (phase.factor > 1 or not returned):
            broken.append(f"{name}: none of the refused came back, so Retry-After is not proven")
        if phase.let_in is not None and phase.let_in < RETRIED:
            broken.append(f"{name}: {phase.let_in:.0%} of the retries were let in")
    return lines, broken


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=60.0, help="for each load")
    parser.add_argument("--loads", type=float, nargs="+", default=LOADS, help="of the capacity")
    parser.add_argument("--soak", type=float, metavar="MINUTES", help="measure memory instead")
    parser.add_argument("--dry", action="store_true", help="do not write docs/reliability.md")
    parser.add_argument("knobs", nargs="*", help="of the server, after `--`")
    options = parser.parse_args()
    command = f"python -m benchmarks.load {shlex.join(a for a in sys.argv[1:] if a != '--dry')}"
    service = Service(options.knobs)
    try:
        return asyncio.run(run(service, options, command.strip()))
    finally:
        service.stop()


async def run(service: Service, options: argparse.Namespace, command: str) -> int:
    limits = service.info["limits"]
    request = photograph()
    capacity = await measure_capacity(service, request, min(options.seconds, 30.0))
    queue, batch = limits["max_queue_size"], limits["max_batch_size"]
    facts = f"Capacity: {capacity:.2f} requests a second, closed loop. {machine()}"
    if options.soak:
        before = service.pids()
        phase, samples = await soak(service, request, capacity, options.soak * 60)
        hours, api, workers = np.array(samples).T
        lines, broken = tell_soak(phase, options.soak, service.pids() == before)
        for name, mib in (("API process", api), ("worker", workers)):
            line, grows = tell_slope(name, hours, mib)
            lines.append(line)
            broken += grows
    else:
        phases = [
            await load(service, request, capacity, factor, options.seconds)
            for factor in options.loads
        ]
        lines, broken = tell_load(phases, capacity, queue, batch)
        lines += [
            "",
            f"The limit of p99 is (queue of {queue} + one batch of {batch}) / throughput. "
            "Throughput is the measured one where requests were refused, otherwise the capacity.",
        ]
    verdict = "Broken: " + "; ".join(broken) + "." if broken else "Every promise above held."
    lines += ["", f"{verdict} {facts} Written by `{command}`."]
    print("\n".join(lines))
    if not options.dry:
        write_section("soak" if options.soak else "load", "\n".join(lines))
    return 1 if broken else 0


def photograph() -> bytes:
    """One request with a photograph of 451 x 300 pixels, as it goes over the wire."""
    buffer = io.BytesIO()
    Image.fromarray(data.chelsea()).save(buffer, "JPEG")  # type: ignore[no-untyped-call]
    body = {"image": base64.b64encode(buffer.getvalue()).decode(), "candidate_labels": LABELS}
    return post("/v1/classify", json.dumps(body).encode())


if __name__ == "__main__":
    sys.exit(main())
