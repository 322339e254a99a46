"""How many requests a second one API process carries, whatever its workers need.

python -m benchmarks.front --seconds 15 --write

The worker behind it answers at once, so that HTTP, limits, decoding, queueing and JSON remain.
Clients in a closed loop keep it busy. They and the decoders run beside it, so on a small machine
the rate is bounded by the cores; the API process' own time for each request is not.
"""

import argparse
import asyncio
import sys
from dataclasses import dataclass

from benchmarks.harness.load import drive_closed, summarize
from benchmarks.harness.machine import machine
from benchmarks.harness.report import DOCS, command_line, make_parser, write_section
from benchmarks.harness.requests import draw_requests
from benchmarks.isolated import serve_instantly
from models.evaluation.table import tabulate

PICTURES = 32  # different ones
CLIENTS = (1, 4, 16, 64)


@dataclass(frozen=True, slots=True)
class Carried:
    """What so many clients got: answers, answers a second, milliseconds, and processor milliseconds
    of the API process and of the decoders for each answer."""

    clients: int
    answered: int
    rate: float
    p50: float
    p99: float
    api_ms: float
    decode_ms: float
    failed: int


def measure(clients: int, seconds: float) -> Carried:
    requests = draw_requests(PICTURES)
    with serve_instantly("--max-queue-size", "1000") as server:
        asyncio.run(drive_closed(server.url, requests, clients, seconds / 4))
        before, decoding = server.cpu_seconds(), server.decoder_cpu_seconds()
        found = summarize(asyncio.run(drive_closed(server.url, requests, clients, seconds)))
        spent = server.cpu_seconds() - before
        decoded = server.decoder_cpu_seconds() - decoding
    each = 1000 / max(1, found["answered"])
    return Carried(
        clients,
        found["answered"],
        found["throughput"],
        1000 * found["p50"],
        1000 * found["p99"],
        each * spent,
        each * decoded,
        found["sent"] - found["answered"],
    )


def write(rows: list[Carried], command: str) -> str:
    """The section of docs/capacity.md."""
    heads = ("clients", "answers/s", "p50 ms", "p99 ms", "API process ms", "decoders ms", "failed")
    table = tabulate(
        heads,
        [
            (
                str(row.clients),
                f"{row.rate:.0f}",
                f"{row.p50:.0f}",
                f"{row.p99:.0f}",
                f"{row.api_ms:.1f}",
                f"{row.decode_ms:.1f}",
                str(row.failed),
            )
            for row in rows
        ],
    )
    best, least = max(row.rate for row in rows), min(row.api_ms for row in rows)
    told = (
        f"One API process carried {best:.0f} requests a second here, with clients and decoders on "
        f"the same cores. It needs {least:.1f} ms of processor time for each, so a core of its own "
        f"carries at most {1000 / least:.0f} a second. JPEG of 640 x 480, 10 labels, a worker that "
        f"answers at once. {machine()} Written by `{command}`."
    )
    return f"{table}\n\n{told}"


def main() -> int:
    parser = make_parser("benchmarks.front", __doc__)
    parser.add_argument("--seconds", type=float, default=15.0, help="for each number of clients")
    parser.add_argument("--clients", type=int, nargs="+", default=CLIENTS)
    parser.add_argument("--write", action="store_true", help="write docs/capacity.md from this run")
    options: argparse.Namespace = parser.parse_args()
    rows = [measure(clients, options.seconds) for clients in options.clients]
    text = write(rows, command_line("benchmarks.front"))
    print(text)
    if options.write:
        write_section("front", text, DOCS / "capacity.md")
    return 1 if any(row.failed for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
