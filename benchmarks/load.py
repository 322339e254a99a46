"""Overload and endurance of the running service, and whether what is promised of them holds.

python -m benchmarks.load --seconds 60          # 0.5x, 1x, 2x, 10x of the measured capacity
python -m benchmarks.load --soak 30             # minutes at 0.8x: how memory grows
python -m benchmarks.load ... -- --workers 2    # knobs of the server after the dashes

Open loop, on a server of its own. It checks what docs/reliability.md promises: every request gets
one answer; the p99 of accepted requests stays below queue / throughput + one batch; every 429 has a
Retry-After; 95% of the clients that wait for it, until the load is over, are accepted; during a
soak no process dies and memory does not grow. The exit status is 1 if a promise is broken or could
not be checked.

A soak stops its load several times and reads the memory then. Under load, memory follows the number
of requests that wait.
"""

import argparse
import asyncio
import sys
import time
from dataclasses import dataclass

import numpy as np

from benchmarks.harness.load import Record, drive, measure_capacity, steady
from benchmarks.harness.machine import machine
from benchmarks.harness.report import command_line, make_parser, write_section
from benchmarks.harness.requests import photograph, post_json
from benchmarks.harness.server import Server

LOADS = (0.5, 1.0, 2.0, 10.0)
SOAK_LOAD = 0.8
STRETCHES = 7  # of load in a soak; the memory after the first, the warm-up, is not counted
REST = 70.0  # seconds without load after each; within a minute, free memory is returned
FLAT = 10.0  # MiB an hour that count as no growth
RETRIED = 0.95  # share of first retries that must be accepted


@dataclass(frozen=True, slots=True)
class Phase:
    """One load, and the retries of refused clients after it was over."""

    factor: float
    records: list[Record]
    retries: list[Record]

    def count(self, *statuses: int | None) -> int:
        return sum(record.status in statuses for record in self.records)

    @property
    def answered_once(self) -> bool:
        """Whether every request had exactly one answer."""
        return all(record.answers == 1 for record in [*self.records, *self.retries])

    @property
    def untold(self) -> int:
        """How many 429 had no Retry-After."""
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
    def retries_accepted(self) -> float | None:
        """Share of the retries that were accepted."""
        if not self.retries:
            return None
        return sum(record.status == 200 for record in self.retries) / len(self.retries)


async def load(
    service: Server, request: bytes, rate: float, factor: float, seconds: float
) -> Phase:
    """Offer `factor` times the rate, then retry what was refused as its Retry-After says."""
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
    service: Server, request: bytes, rate: float, seconds: float
) -> tuple[Phase, list[tuple[float, float, float]]]:
    """A load below capacity, and (hours, MiB of the API, MiB of the workers) at each rest."""
    began, records, samples = time.monotonic(), [], []
    arrivals = steady(rate * SOAK_LOAD, seconds / STRETCHES)
    for _ in range(STRETCHES):
        records += await drive(service.url, arrivals, [request])
        await asyncio.sleep(REST)
        samples.append(((time.monotonic() - began) / 3600, *service.memory()))
    return Phase(SOAK_LOAD, records, []), samples[1:]


def report_soak(phase: Phase, minutes: float, same: bool) -> tuple[list[str], list[str]]:
    """The line on answers, and the promises that were broken. `same`: the processes at the end are
    those at the beginning."""
    others = len(phase.records) - phase.count(200, 429)
    found = {
        "a request had no answer, or two": not phase.answered_once,
        f"{others} requests met neither 200 nor 429": others,
        f"{phase.untold} were refused and not told when to come back": phase.untold,
        "the API process or a worker was lost": not same,
    }
    line = (
        f"- {len(phase.records)} requests at {phase.factor:g}x for {minutes:g} minutes: "
        f"{phase.count(200)} answered 200, {phase.count(429)} 429, {others} other; memory is read "
        f"in {STRETCHES - 1} rests of {REST:g} s, after a warm-up"
    )
    return [line], [what for what, holds in found.items() if holds]


def report_slope(name: str, hours: np.ndarray, mib: np.ndarray) -> tuple[str, list[str]]:
    """The slope of memory over time with its standard error, and the promise it breaks."""
    line, spread = np.polyfit(hours, mib, 1, cov=True)
    steep, error = line[0], spread[0, 0] ** 0.5
    told = f"{steep:+.1f} ± {error:.1f} MiB an hour (at the end {mib[-1]:.0f} MiB)"
    grows = steep - 2 * error > FLAT
    return f"- {name}: {told}", [f"the memory of the {name} grows"] if grows else []


def report_load(
    phases: list[Phase], capacity: float, queue: int, batch: int
) -> tuple[list[str], list[str]]:
    """The lines of the table, and the promises that were broken.

    If requests were refused, the bound on p99 uses the throughput of that load: client and server
    share the machine, and refusing takes time too. Otherwise throughput is what the clients sent,
    and the bound uses the capacity.

    A load whose refused clients were all due before it ended proves nothing about Retry-After. At
    or below capacity such refusals may be few and early; then the retries of another load suffice.
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
        share = "" if phase.retries_accepted is None else f"{phase.retries_accepted:.0%}"
        lines.append(
            f"| {phase.factor:g}x | {len(phase.records)} | {phase.count(200)} | {phase.count(429)} "
            f"| {others} | {odd} | {phase.throughput:.2f} | {p50:.2f} | {p99:.2f} | {bound:.2f} "
            f"| {len(phase.retries)} | {share} |"
        )
        name = f"at {phase.factor:g}x"
        if not phase.answered_once:
            broken.append(f"{name}: {odd} requests had no answer, or two")
        if others:
            broken.append(f"{name}: {others} requests met neither 200 nor 429")
        if p99 > bound:
            broken.append(f"{name}: p99 {p99:.2f} s is above {bound:.2f} s")
        if phase.untold:
            broken.append(f"{name}: {phase.untold} were refused and not told when to come back")
        if phase.count(429) and not phase.retries and (phase.factor > 1 or not returned):
            broken.append(f"{name}: none of the refused came back, so Retry-After is not proven")
        if phase.retries_accepted is not None and phase.retries_accepted < RETRIED:
            broken.append(f"{name}: {phase.retries_accepted:.0%} of the retries were let in")
    return lines, broken


def main() -> int:
    parser = make_parser("benchmarks.load", __doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="for each load")
    parser.add_argument("--loads", type=float, nargs="+", default=LOADS, help="of the capacity")
    parser.add_argument("--soak", type=float, metavar="MINUTES", help="measure memory instead")
    parser.add_argument("--dry", action="store_true", help="do not write docs/reliability.md")
    parser.add_argument("knobs", nargs="*", help="of the server, after `--`")
    options = parser.parse_args()
    with Server(*options.knobs) as service:
        return run(service, options)


def run(service: Server, options: argparse.Namespace) -> int:
    """Measure, print and write the section; the exit status."""
    limits = service.http.get("/info").json()["limits"]
    request = post_json(photograph())
    capacity = measure_capacity(service.url, photograph(), min(options.seconds, 30.0))
    queue, batch = limits["max_queue_size"], limits["max_batch_size"]
    facts = f"Capacity: {capacity:.2f} requests a second, closed loop. {machine()}"
    if options.soak:
        before = service.pids()
        phase, samples = asyncio.run(soak(service, request, capacity, options.soak * 60))
        hours, api, workers = np.array(samples).T
        lines, broken = report_soak(phase, options.soak, service.pids() == before)
        for name, mib in (("API process", api), ("worker", workers)):
            line, grows = report_slope(name, hours, mib)
            lines.append(line)
            broken += grows
    else:
        phases = [
            asyncio.run(load(service, request, capacity, factor, options.seconds))
            for factor in options.loads
        ]
        lines, broken = report_load(phases, capacity, queue, batch)
        lines += [
            "",
            f"The limit of p99 is (queue of {queue} + one batch of {batch}) / throughput. "
            "Throughput is the measured one where requests were refused, otherwise the capacity.",
        ]
    verdict = "Broken: " + "; ".join(broken) + "." if broken else "Every promise above held."
    lines += ["", f"{verdict} {facts} Written by `{command_line('benchmarks.load')}`."]
    print("\n".join(lines))
    if not options.dry:
        write_section("soak" if options.soak else "load", "\n".join(lines))
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
