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
WARM_UP = 0.2  # share of a soak that is not looked at
FLAT = 10.0  # MiB an hour that count as flat; a short soak still sees the warm-up, and fails
RETRIED = 0.95  # share of the refused that must be let in at their first retry


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


async def load(
    service: Server, request: bytes, rate: float, factor: float, seconds: float
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
    service: Server, request: bytes, rate: float, seconds: float
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
        lines, broken = tell_soak(phase, options.soak, service.pids() == before)
        for name, mib in (("API process", api), ("worker", workers)):
            line, grows = tell_slope(name, hours, mib)
            lines.append(line)
            broken += grows
    else:
        phases = [
            asyncio.run(load(service, request, capacity, factor, options.seconds))
            for factor in options.loads
        ]
        lines, broken = tell_load(phases, capacity, queue, batch)
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
