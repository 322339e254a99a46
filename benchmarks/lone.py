"""Where each millisecond of a lone request goes, from the socket to the answer.

python -m benchmarks.lone --write

One client on a kept-alive connection asks again as soon as it has its answer, so no request waits
for another. The answer says how long decoding, adapting and predicting took. What remains of the
time that the client saw is the service: HTTP, JSON, limits, queue and pipes.
"""

import argparse
import sys
import time
from dataclasses import dataclass
from statistics import median

import httpx

from benchmarks.harness.load import percentile
from benchmarks.harness.machine import machine
from benchmarks.harness.report import DOCS, command_line, make_parser, write_section
from benchmarks.harness.requests import LABELS, classification, draw_file
from benchmarks.harness.server import Server
from models.evaluation.table import tabulate

PICTURES = 32  # different ones
WARM_UP = 5  # requests
COMPUTED = ("decode", "adapt", "predict")


@dataclass(frozen=True, slots=True)
class Spent:
    """Milliseconds of one request: what the client saw, and what the answer says."""

    seen: float
    told: dict[str, float]

    @property
    def outside(self) -> float:
        """HTTP before the first byte was read and after the answer was made."""
        return self.seen - self.told["total"]

    @property
    def rest(self) -> float:
        """What no other stage accounts for."""
        return self.service - self.outside - self.told["queue"]

    @property
    def service(self) -> float:
        """All but decoding and computing."""
        return self.seen - sum(self.told[name] for name in COMPUTED)


def ask(http: httpx.Client, method: str, requests: int) -> list[Spent]:
    """So many answers with a defense, one after the other."""
    bodies = [classification(draw_file(n), LABELS, method=method) for n in range(PICTURES)]
    found = []
    for number in range(WARM_UP + requests):
        began = time.perf_counter()
        answer = http.post("/v1/classify", json=bodies[number % PICTURES])
        seen = 1000 * (time.perf_counter() - began)
        found.append(Spent(seen, answer.raise_for_status().json()["timings_ms"]))
    return found[WARM_UP:]


def write(found: dict[str, list[Spent]], command: str) -> str:
    """The section of docs/performance.md."""
    heads = ("", *(f"`{method}`" for method in found))
    stages = {
        "seen by the client": lambda spent: spent.seen,
        "decoding": lambda spent: spent.told["decode"],
        "adapting": lambda spent: spent.told["adapt"],
        "predicting": lambda spent: spent.told["predict"],
        "queue": lambda spent: spent.told["queue"],
        "HTTP outside of the measured total": lambda spent: spent.outside,
        "parsing, hashing, pipes to the worker": lambda spent: spent.rest,
        "**all but decoding and computing**": lambda spent: spent.service,
    }
    rows = [
        (name, *(f"{median(map(read, spent)):.1f}" for spent in found.values()))
        for name, read in stages.items()
    ]
    tail = ", ".join(
        f"{percentile([each.service for each in spent], 0.99):.1f} with `{method}`"
        for method, spent in found.items()
    )
    count = min(map(len, found.values()))
    return (
        f"{tabulate(heads, rows)}\n\nMilliseconds at p50, {count} requests each, one at a time: "
        f"JPEG of 640 x 480, {len(LABELS)} labels, embedded model. All but decoding and computing "
        f"at p99: {tail}. {machine()} Written by `{command}`."
    )


def main() -> int:
    parser = make_parser("benchmarks.lone", __doc__)
    parser.add_argument("--requests", type=int, default=200, help="for each defense")
    parser.add_argument("--methods", nargs="+", default=["plain", "tapt"], help="defenses")
    parser.add_argument("--write", action="store_true", help="write docs/performance.md")
    options: argparse.Namespace = parser.parse_args()
    with Server() as server, httpx.Client(base_url=server.url, timeout=60) as http:
        found = {method: ask(http, method, options.requests) for method in options.methods}
    text = write(found, command_line("benchmarks.lone"))
    print(text)
    if options.write:
        write_section("lone", text, DOCS / "performance.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
