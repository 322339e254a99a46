"""Where each millisecond of a lone request goes, from the client's socket and back.

python -m benchmarks.lone --write

One client on a kept-alive connection asks again as soon as it has its answer, so no request waits
for another. The stages follow each other without a gap: see `benchmarks.stamped`.
"""

import argparse
import http.client
import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median

from benchmarks.harness.load import percentile
from benchmarks.harness.machine import machine
from benchmarks.harness.report import DOCS, command_line, make_parser, write_section
from benchmarks.harness.requests import LABELS, classification, draw_file
from benchmarks.harness.server import Server
from benchmarks.stamped import STAGES, read_stamps, serve_stamped
from models.evaluation.table import tabulate
from service.settings import Settings

PICTURES = 32  # different ones
WARM_UP = 5  # requests
COMPUTED = ("decoded", "computed")  # the stages that the service is for

Sent = tuple[float, float]
"""The instants at which a client began to send a request and had its answer."""

Spent = Mapping[str, float]
"""Milliseconds of one request, by the name of the instant at which a stage ends."""


def ask(server: Server, method: str, requests: int) -> list[Sent]:
    """So many answers with a defense, one after the other."""
    bodies = [
        json.dumps(classification(draw_file(number), LABELS, method=method))
        for number in range(PICTURES)
    ]
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    found = []
    for number in range(WARM_UP + requests):
        began = time.monotonic()
        connection.request("POST", "/v1/classify", bodies[number % PICTURES])
        answer = connection.getresponse()
        answer.read()
        found.append((began, time.monotonic()))
        if answer.status != 200:
            raise RuntimeError(f"the server answered {answer.status}")
    connection.close()
    return found[WARM_UP:]


def split(sent: Sent, stamps: Sequence[tuple[float, str]]) -> Spent:
    """A request's time by stage. Raises ValueError unless each stage ended once, in order."""
    began, received = sent
    inside = [stamp for stamp in stamps if began <= stamp[0] <= received]
    ends = [*inside, (received, "received")]
    if [name for _, name in ends] != list(STAGES):
        raise ValueError(f"a request passed {[name for _, name in ends]}")
    starts = [began, *(instant for instant, _ in inside)]
    return {name: 1000 * (end - start) for (end, name), start in zip(ends, starts, strict=True)}


def service(spent: Spent) -> float:
    """The milliseconds of all but decoding and computing."""
    return sum(spent.values()) - sum(spent[name] for name in COMPUTED)


def write(found: Mapping[str, Sequence[Spent]], command: str) -> str:
    """The section of docs/performance.md."""
    rows = [
        (title, *(f"{median(one[name] for one in spent):.2f}" for spent in found.values()))
        for name, title in STAGES.items()
    ]
    for title, total in (
        ("seen by the client", lambda one: sum(one.values())),
        ("**all but decoding and computing**", service),
    ):
        rows.append((title, *(f"{median(map(total, spent)):.2f}" for spent in found.values())))
    tail = ", ".join(
        f"{percentile([service(one) for one in spent], 0.99):.1f} with `{method}`"
        for method, spent in found.items()
    )
    count = min(map(len, found.values()))
    return (
        f"{tabulate(('', *(f'`{method}`' for method in found)), rows)}\n\n"
        f"Milliseconds at p50, {count} requests each, one at a time: JPEG of 640 x 480, "
        f"{len(LABELS)} labels, model {Settings().model}. All but decoding and computing at "
        f"p99: {tail}. {machine()} Written by `{command}`."
    )


def measure(methods: Sequence[str], requests: int) -> dict[str, list[Spent]]:
    """The time of each request, by defense."""
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "stamps"
        with serve_stamped(file) as server:
            sent = {method: ask(server, method, requests) for method in methods}
        stamps = read_stamps(file)
    return {method: [split(one, stamps) for one in each] for method, each in sent.items()}


def main() -> int:
    parser = make_parser("benchmarks.lone", __doc__)
    parser.add_argument("--requests", type=int, default=200, help="for each defense")
    parser.add_argument("--methods", nargs="+", default=["plain", "tapt"], help="defenses")
    parser.add_argument("--write", action="store_true", help="write docs/performance.md")
    options: argparse.Namespace = parser.parse_args()
    text = write(measure(options.methods, options.requests), command_line("benchmarks.lone"))
    print(text)
    if options.write:
        write_section("lone", text, DOCS / "performance.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
