"""How many replicas a load needs: a queueing simulation fed by measured service times.

python -m benchmarks.capacity --times runs/benchmarks/service.json --target 2.0 --check 20

Arrivals are Poisson; requests go to the replica with the fewest open requests (`least`) or in turn.
Each replica forms batches as the scheduler does; a batch takes as long as it did in the bare
engine. At most `CELL` replicas share a gateway, so a large deployment is many equal cells.
`--check` compares with a real run of one and two replicas.
"""

import argparse
import asyncio
import heapq
import json
import math
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness.load import Record, drive, percentile, poisson, summarize
from benchmarks.harness.machine import hardware
from benchmarks.harness.report import DOCS, command_line, make_parser, publish
from benchmarks.harness.requests import draw_requests
from benchmarks.harness.server import Server
from benchmarks.isolated import measure_bare
from benchmarks.service import describe_requests
from models.evaluation.table import tabulate
from service.settings import Settings
from service.worker.process import prepare_torch

PAGE = DOCS / "capacity.md"
CELL = 16  # replicas behind one gateway
REQUESTS = 20_000  # simulated for each question
LOADS = (10, 1_000, 100_000)  # requests a second
WORKERS = (1, 2, 4)


@dataclass(frozen=True, slots=True)
class Replica:
    """Seconds of a batch by its size, and how batches are formed."""

    seconds: Mapping[int, float]
    max_batch: int
    max_delay: float

    def time(self, size: int) -> float:
        """Seconds of a batch of any size, between the measured ones in a straight line."""
        known = sorted(self.seconds)
        above = next((one for one in known if one >= size), known[-1])
        below = next((one for one in reversed(known) if one <= size), known[0])
        if above == below:
            return self.seconds[above] * max(1.0, size / above)
        share = (size - below) / (above - below)
        return self.seconds[below] + share * (self.seconds[above] - self.seconds[below])

    @property
    def throughput(self) -> float:
        """The most requests a second."""
        return max(n / self.time(n) for n in range(1, self.max_batch + 1))


def simulate(
    replica: Replica, replicas: int, arrivals: Sequence[float], route: str = "least"
) -> list[float]:
    """Seconds from arrival to answer of each request, in the order of the answers.

    A batch starts when its replica is free and is full, or its oldest has waited `max_delay`.
    """
    queues: list[deque[float]] = [deque() for _ in range(replicas)]
    load, free_at = [0] * replicas, [0.0] * replicas
    latencies: list[float] = []
    events: list[tuple[float, int, int, int]] = []  # instant, kind, replica, requests done

    def start(place: int, now: float) -> None:
        queue = queues[place]
        while queue and free_at[place] <= now:
            due = queue[0] + replica.max_delay
            if len(queue) < replica.max_batch and now < due:
                heapq.heappush(events, (due, 1, place, 0))
                return
            size = min(len(queue), replica.max_batch)
            free_at[place] = now + replica.time(size)
            latencies.extend(free_at[place] - queue.popleft() for _ in range(size))
            heapq.heappush(events, (free_at[place], 0, place, size))

    def run_until(instant: float) -> None:
        while events and events[0][0] <= instant:
            now, _, place, done = heapq.heappop(events)
            load[place] -= done
            start(place, now)

    for number, now in enumerate(arrivals):
        run_until(now)
        place = number % replicas
        if route == "least":
            place = min(range(replicas), key=lambda one: (load[one], (one - number) % replicas))
        queues[place].append(now)
        load[place] += 1
        start(place, now)
    run_until(math.inf)
    return latencies


def p99(replica: Replica, replicas: int, rate: float) -> float:
    """The 99th percentile in seconds of `rate` requests a second to so many replicas."""
    return percentile(simulate(replica, replicas, poisson(rate, REQUESTS / rate, 0)), 0.99)


def half_load(replica: Replica) -> float:
    """The p99 of one replica at half of its throughput, divided by the time of a single request."""
    return p99(replica, 1, replica.throughput / 2) / replica.time(1)


def one_by_one(workers: int) -> float:
    """The same without any gain from batches: each request takes a time of 1, alone, on the worker
    that is free first (an M/D/k queue)."""
    free, latencies = [0.0] * workers, []
    for now in poisson(workers / 2, 2 * REQUESTS / workers, 0):
        done = max(now, free[0]) + 1
        heapq.heapreplace(free, done)
        latencies.append(done - now)
    return percentile(latencies, 0.99)


def plan_replicas(replica: Replica, rate: float, target: float) -> tuple[int, float] | None:
    """The fewest replicas whose p99 is within the target, and that p99; beyond one gateway whole
    cells. None where one request alone takes longer."""
    if replica.time(1) + replica.max_delay > target:
        return None
    for replicas in range(max(1, math.ceil(rate / replica.throughput)), CELL + 1):
        if (found := p99(replica, replicas, rate)) <= target:
            return replicas, found
    low, high = 0.0, CELL * replica.throughput  # the most that a cell takes lies between
    while high - low > 0.01 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if p99(replica, CELL, middle) <= target else (low, middle)
    cells = math.ceil(rate / low)
    while (found := p99(replica, CELL, rate / cells)) > target:  # simulated, so not quite smooth
        cells += max(1, cells // 200)
    return cells * CELL, found


def check(seconds: float, settings: Settings) -> list[dict[str, Any]]:
    """A real run of one and two replicas of one thread each, and what the simulation says."""
    requests, found = draw_requests(16), []
    for replicas in (1, 2):
        with ExitStack() as stack:
            one_thread = {"OMP_NUM_THREADS": "1"}
            running = [stack.enter_context(Server(env=one_thread)) for _ in range(replicas)]
            urls = [server.url for server in running]
            # The service times of one thread, measured while the others work as well.
            alone = _times_through(urls, requests, settings.max_batch_size)
            replica = Replica(alone, settings.max_batch_size, settings.max_queue_delay_ms / 1000)
            rate = 0.6 * replicas * replica.throughput
            arrivals = poisson(rate, seconds, replicas)
            records = asyncio.run(_drive_in_turn(urls, arrivals, requests))
        real = summarize(records)
        simulated = simulate(replica, replicas, arrivals, route="turn")
        found.append(
            {
                "replicas": replicas,
                "rate": rate,
                "n": real["answered"],
                "service_seconds": alone,
                "real": {p: real[p] for p in ("p50", "p99", "throughput")},
                "simulated": {
                    "p50": percentile(simulated, 0.5),
                    "p99": percentile(simulated, 0.99),
                },
            }
        )
    return found


def _times_through(
    urls: Sequence[str], requests: Sequence[bytes], largest: int
) -> dict[int, float]:
    """Seconds of a batch by size, seen from outside: so many requests at once to each replica."""
    times: dict[int, float] = {}
    sizes = [size for size in (1, 2, 4, 8, 16) if size <= largest]
    for size in [sizes[0], *sizes]:  # the first warms up
        begun = time.monotonic()
        asyncio.run(_drive_in_turn(urls, [0.0] * size * len(urls), requests))
        times[size] = time.monotonic() - begun
    return times


async def _drive_in_turn(
    urls: Sequence[str], arrivals: Sequence[float], requests: Sequence[bytes]
) -> list[Record]:
    """Spread the arrivals over the replicas, in turn."""
    shares = [arrivals[place :: len(urls)] for place in range(len(urls))]
    runs = (drive(url, share, requests) for url, share in zip(urls, shares, strict=True))
    return [record for records in await asyncio.gather(*runs) for record in records]


def measure(options: argparse.Namespace) -> dict[str, Any]:
    settings = Settings(device=options.device)
    if options.times:
        measured = json.loads(options.times.read_text())
        seconds = {int(size): one for size, one in measured["service_seconds"].items()}
        machine, asked = measured["machine"], measured["settings"]
    else:
        bare = measure_bare(settings, [1, 2, 4, 8, settings.max_batch_size], 10)
        seconds = {size: sorted(ones)[len(ones) // 2] for size, ones in bare["times"].items()}
        machine, asked = bare["machine"], settings.model_dump()
    replica = Replica(seconds, settings.max_batch_size, settings.max_queue_delay_ms / 1000)
    rows = []
    for rate in LOADS:
        planned = plan_replicas(replica, rate, options.target)
        row: dict[str, Any] = {"rate": rate, "replicas": None}
        if planned is not None:
            replicas, row["p99"] = planned
            row["replicas"] = replicas
            row["utilization"] = rate / (replicas * replica.throughput)
            row["price_an_hour"] = replicas * options.price
            row["price_a_million"] = replicas * options.price / 3600 / rate * 1e6
        rows.append(row)
    return {
        "command": command_line("benchmarks.capacity"),
        "machine": machine,
        "requests": describe_requests(asked),
        "target": options.target,
        "price": options.price,
        "service_seconds": seconds,
        "throughput": replica.throughput,
        "half_load": half_load(replica),
        "one_by_one": {workers: one_by_one(workers) for workers in WORKERS},
        "rows": rows,
        "check": _checked(options, settings),
    }


def _checked(options: argparse.Namespace, settings: Settings) -> list[dict[str, Any]]:
    """A real run's figures: made now, or kept from an earlier one."""
    if options.checked:
        kept: list[dict[str, Any]] = json.loads(options.checked.read_text())["check"]
        return kept
    return check(options.check, settings) if options.check else []


def write_page(figures: dict[str, Any]) -> str:
    """The plan and its check as Markdown."""
    rows = [
        (f"{row['rate']:,}", "none is fast enough", "", "", "", "")
        if row["replicas"] is None
        else (
            f"{row['rate']:,}",
            f"{row['replicas']:,}",
            f"{row['utilization']:.0%}",
            f"{row['p99']:.2f}",
            f"{row['price_an_hour']:,.2f}",
            f"{row['price_a_million']:,.2f}",
        )
        for row in figures["rows"]
    ]
    heads = ("requests/s", "replicas", "busy", "p99 s", "price/hour", "price/million requests")
    batches = ", ".join(f"{n}: {1000 * s:.0f}" for n, s in figures["service_seconds"].items())
    text = (
        f"Simulated with {REQUESTS:,} requests per row, for a p99 of {figures['target']:g} s. One "
        f"replica answers at most {figures['throughput']:.2f} requests/s. Milliseconds per batch, "
        f"by batch size: {batches}; measured on {hardware(figures['machine'])}. "
        f"{figures['requests']}. "
        f"The price of a replica, {figures['price']:g} an hour, is an assumption; set it with "
        "`--price`."
    )
    alone = ", ".join(f"{times:.1f} with {k}" for k, times in figures["one_by_one"].items())
    half = (
        "In the same simulation, at half of its maximum rate, one replica's p99 is "
        f"{figures['half_load']:.1f} times the latency of a single request. Random arrivals alone "
        "explain much of this: if batching saves nothing and every request takes the same time, "
        f"the factor is, by number of workers: {alone}."
    )
    parts = [tabulate(heads, rows), text, half]
    if figures["check"]:
        checked = [
            (
                str(row["replicas"]),
                f"{row['rate']:.2f}",
                str(row["n"]),
                *(f"{row[kind][p]:.2f}" for p in ("p50", "p99") for kind in ("real", "simulated")),
            )
            for row in figures["check"]
        ]
        times = ("p50 s real", "simulated", "p99 s real", "simulated")
        parts += [
            tabulate(("replicas", "requests/s", "n", *times), checked),
            "Real: single-threaded replicas on this machine, requests distributed in turn, at 60% "
            "of the rate that their measured batch times allow.",
        ]
    return "\n\n".join([*parts, f"Made by `{figures['command']}`."]) + "\n"


def main() -> int:
    parser = make_parser("benchmarks.capacity", __doc__)
    add = parser.add_argument
    add("--times", type=Path, help="figures of benchmarks.service; absent: measured now")
    add("--device", default="cpu")
    add("--target", type=float, default=2.0, help="p99 in seconds")
    add("--price", type=float, default=0.08, help="of a replica an hour, in any currency")
    add("--check", type=float, default=0.0, help="seconds of a real run of 1 and 2 replicas")
    add("--checked", type=Path, help="figures of an earlier run, whose real run to show again")
    add("--json", type=Path, metavar="OUT", default=Path("runs/benchmarks/capacity.json"))
    add("--write", action="store_true", help="write docs/capacity.md from this run")
    options = parser.parse_args()
    prepare_torch()
    figures = measure(options)
    section = "capacity" if options.write else None
    publish(figures, write_page(figures), options.json, section, PAGE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
