"""A simulated day of a large fleet, in which a zone fails at the worst moment.

python -m benchmarks.day --times runs/benchmarks/service.json --write

Load follows the hours of a day. The autoscaler computes as Kubernetes' does: replicas times the
measured expected seconds in a queue (`tapt_queue_seconds_expected`), divided by their target. It
never goes below a floor, which is what the load needs at full throughput and a share more. At the
peak one of three zones fails: the requests in it are lost, and the others take its load.

Time passes in steps. Within one, requests wait as in a queue with random arrivals and equal service
times (M/D/c with the replicas of a cell, by Sakasegawa's approximation); beyond the capacity queues
grow until the service refuses what would wait longer than it admits.
"""

import argparse
import json
import math
import sys
from collections import deque
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.capacity import CELL
from benchmarks.harness.machine import hardware
from benchmarks.harness.report import DOCS, command_line, make_parser, publish
from models.evaluation.table import tabulate
from service.engine.engine import QUEUE_SHARE
from service.settings import Settings

PAGE = DOCS / "capacity.md"
HOUR, STEP = 3600.0, 5.0  # seconds
ZONES = 3
FAILS_AT, FAILS_FOR = 14 * HOUR, 1 * HOUR
TOLERANCE = 0.1  # around the target, within which Kubernetes' autoscaler does nothing
SCALE_EVERY = 15.0  # seconds
MOST_UP, MOST_DOWN = 1.25, 0.995  # factors at once: doubles in 45 s, halves in 35 minutes


@dataclass(frozen=True, slots=True)
class Plan:
    """A fleet and its load.

    Attributes:
        peak: requests a second at 14:00; at night, a third of it.
        throughput: requests a second of a replica in full batches.
        target: seconds in a replica's queue that the autoscaler keeps.
        floor: the autoscaler's floor, as a share beyond what the load needs at full throughput.
        most: the autoscaler's limit, as a factor of what the peak needs at full throughput.
        start: seconds from the autoscaler's decision until a replica is ready.
        admitted: seconds of queue beyond which requests are refused.
    """

    peak: float
    throughput: float
    target: float
    floor: float
    most: float
    start: float
    admitted: float

    def load(self, at: float) -> float:
        """Requests a second at a time of day."""
        return self.peak * (2 / 3 + math.cos(2 * math.pi * (at - FAILS_AT) / (24 * HOUR)) / 3)


@dataclass(slots=True)
class Day:
    """What a day brought."""

    asked: float = 0.0
    refused: float = 0.0
    lost: float = 0.0
    longest: float = 0.0
    slow: float = 0.0  # requests that waited longer than the target
    most: int = 0
    replica_hours: float = 0.0
    recovered: float = 0.0  # seconds after the failure at which nothing is refused any more


def waiting(load: float, replicas: float, throughput: float) -> float:
    """Mean seconds that a request waits for a replica of its cell; infinite at full load."""
    busy = load / (replicas * throughput) if replicas else math.inf
    if busy >= 1:
        return math.inf
    power = math.sqrt(2 * (CELL + 1)) - 1
    return float(busy**power / (2 * CELL * (1 - busy) * throughput))


def want(plan: Plan, load: float, seconds: float, replicas: int, expected: int) -> int:
    """What the autoscaler wants with so many seconds in the queue of a replica. `expected` counts
    replicas that are starting, too."""
    ratio, wanted = seconds / plan.target, expected
    if ratio > 1 + TOLERANCE:  # those that are starting will help
        wanted = max(expected, min(math.ceil(replicas * ratio), math.ceil(expected * MOST_UP)))
    elif ratio < 1 - TOLERANCE:
        wanted = math.ceil(expected * max(ratio, MOST_DOWN))
    wanted = max(wanted, math.ceil(load / plan.throughput * (1 + plan.floor)))
    return min(wanted, math.ceil(plan.peak / plan.throughput * plan.most))


def simulate(plan: Plan) -> Day:
    """A day from midnight to midnight."""
    day = Day()
    first = plan.load(0) / plan.throughput * max(1 + plan.floor, 1.1)
    zones = [math.ceil(first / ZONES)] * ZONES
    starting: list[deque[tuple[float, int]]] = [deque() for _ in zones]
    queue = 0.0
    steps = int(24 * HOUR / STEP)
    for number in range(steps):
        now = number * STEP
        failed = FAILS_AT <= now < FAILS_AT + FAILS_FOR
        if now == FAILS_AT:
            running = plan.load(now) / plan.throughput
            day.lost += (queue + running) / ZONES
            queue -= queue / ZONES
            zones[0] = 0
            starting[0].clear()
        for place, due in enumerate(starting):
            while due and due[0][0] <= now:
                zones[place] += due.popleft()[1]
        replicas = sum(zones)
        load, capacity = plan.load(now), replicas * plan.throughput
        arrived = load * STEP
        queue = max(0.0, queue + arrived - capacity * STEP)
        room = plan.admitted * capacity
        refused = min(arrived, max(0.0, queue - room))
        queue -= refused
        wait = queue / capacity + waiting(load, replicas, plan.throughput)
        wait = min(wait, plan.admitted)
        day.asked += arrived
        day.refused += refused
        day.longest = max(day.longest, wait)
        day.slow += arrived * (wait > plan.target)
        day.replica_hours += replicas * STEP / HOUR
        day.most = max(day.most, replicas)
        if refused and now >= FAILS_AT:
            day.recovered = now + STEP - FAILS_AT
        if number % int(SCALE_EVERY / STEP):
            continue
        expected = replicas + sum(count for due in starting for _, count in due)
        busy = min(1.0, load / capacity)
        wanted = want(plan, load, wait + busy / plan.throughput, replicas, expected)
        alive = [place for place in range(ZONES) if not (failed and place == 0)]
        surplus = max(0, expected - wanted)
        for place in alive:
            aim = math.ceil(wanted / len(alive))
            known = zones[place] + sum(count for _, count in starting[place])
            if aim > known:
                starting[place].append((now + plan.start, aim - known))
            else:  # a zone that returns must not cost the others their replicas at once
                cut = max(0, min(surplus, zones[place] - aim))
                zones[place] -= cut
                surplus -= cut
    return day


def write_page(figures: dict[str, Any]) -> str:
    rows = [
        (
            f"{row['floor']:.0%}",
            f"{row['most']:,}",
            f"{row['replica_hours']:,.0f}",
            f"{row['refused'] / row['asked']:.3%}",
            f"{row['lost'] / row['asked']:.5%}",
            f"{row['slow'] / row['asked']:.2%}",
            f"{row['longest']:.1f}",
            f"{row['recovered'] / 60:.1f}",
        )
        for row in figures["rows"]
    ]
    heads = (
        "floor above the load",
        "most replicas",
        "replica hours",
        "refused with 429",
        "lost with the zone",
        "waited longer than the target",
        "longest wait s",
        "minutes until none is refused",
    )
    plan = figures["plan"]
    text = (
        f"A simulated day: {plan['peak']:,.0f} requests a second at 14:00 and a third of that at "
        f"2:00, in {ZONES} zones, of which one fails at 14:00 for an hour. A replica answers "
        f"{plan['throughput']:.2f} requests a second, as measured on "
        f"{hardware(figures['machine'])}; a new one is ready after {plan['start']:g} s; the "
        f"autoscaler aims at {plan['target']:g} s of work in a replica's queue, with at most "
        f"{plan['most']:g} times the replicas that the peak needs at full throughput. What would "
        f"wait longer than {plan['admitted']:g} s is refused."
    )
    return f"{tabulate(heads, rows)}\n\n{text}\n\nMade by `{figures['command']}`.\n"


def main() -> int:
    parser = make_parser("benchmarks.day", __doc__)
    add = parser.add_argument
    add("--times", type=Path, required=True, help="figures of benchmarks.service")
    add("--peak", type=float, default=100_000.0, help="requests a second")
    add("--target", type=float, default=1.0, help="seconds in a queue that the autoscaler keeps")
    add("--floors", type=float, nargs="+", default=[0.0, 0.1, 0.25, 0.5], help="floors to compare")
    add("--most", type=float, default=1.8, help="limit of the fleet, in what the peak needs")
    add("--start", type=float, default=120.0, help="seconds until a new replica is ready")
    add("--json", type=Path, metavar="OUT", default=Path("runs/benchmarks/day.json"))
    add("--write", action="store_true", help="write docs/capacity.md from this run")
    options: argparse.Namespace = parser.parse_args()
    measured = json.loads(options.times.read_text())
    seconds = {int(size): one for size, one in measured["service_seconds"].items()}
    throughput = max(size / one for size, one in seconds.items())
    admitted = QUEUE_SHARE * Settings().request_timeout_ms / 1000
    plan = Plan(options.peak, throughput, options.target, 0, options.most, options.start, admitted)
    rows = []
    for floor in options.floors:
        day = simulate(replace(plan, floor=floor))
        rows.append({"floor": floor, **{name: getattr(day, name) for name in Day.__slots__}})
    figures = {
        "command": command_line("benchmarks.day"),
        "machine": measured["machine"],
        "plan": {name: getattr(plan, name) for name in Plan.__slots__},
        "rows": rows,
    }
    section = "day" if options.write else None
    publish(figures, write_page(figures), options.json, section, PAGE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
