"""Two replicas behind the gateway against one: requests a second and how long each took.

python -m benchmarks.gateway --replicas 1,2 --seconds 20 [--write docs/deploy.md]

The gateway is docker/gateway under Debian's nginx, the replicas are `tapt-serve serve` with one
thread of torch each; clients, gateway and replicas share this machine.
"""

import os
import statistics
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.harness.gateway import Gateway
from benchmarks.harness.load import ClosedLoop
from benchmarks.harness.machine import load_average
from benchmarks.harness.report import make_parser, write_section
from benchmarks.harness.requests import classification, encode
from benchmarks.harness.server import Server
from models.evaluation.table import tabulate
from service.settings import Settings

LABELS = ["fog", "sunset", "keyboard", "cat", "dog", "bus", "lemon", "volleyball"]
PICTURE = np.asarray(Image.radial_gradient("L").convert("RGB"))


def measure(count: int, seconds: float, clients: int, method: str) -> tuple[str, ...]:
    """A row: replicas, requests a second, median and 95th percentile in ms, errors."""
    with ExitStack() as stack:
        flags, one_thread = ("--method", method), {"OMP_NUM_THREADS": "1"}
        replicas = [stack.enter_context(Server(*flags, env=one_thread)) for _ in range(count)]
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        ports = [replica.port for replica in replicas]
        gateway = stack.enter_context(Gateway(directory, ports, rate="10000r/s"))
        body = classification(encode(PICTURE), LABELS)
        load = stack.enter_context(ClosedLoop(gateway.client, body, clients))
        time.sleep(2)  # until all of them are under way
        load.answers.clear()
        time.sleep(seconds)
        taken = list(load.answers)
    good = [1000 * answer.seconds for answer in taken if answer.status == 200]
    if len(good) < 2:
        raise SystemExit(f"{len(good)} good answers in {seconds:g} s; the run was too short")
    tail = statistics.quantiles(good, n=20)[-1]
    rate = f"{len(good) / seconds:.1f}"
    errors = len(taken) - len(good)
    return str(count), rate, f"{statistics.median(good):.0f}", f"{tail:.0f}", str(errors)


def main() -> None:
    parser = make_parser("benchmarks.gateway", __doc__)
    parser.add_argument("--replicas", default="1,2", help="how many, comma-separated")
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--method", default="tapt", help="the replicas' default defense")
    parser.add_argument("--write", type=Path, help="a page with marks for the table `gateway`")
    options = parser.parse_args()
    counts = [int(count) for count in options.replicas.split(",")]
    busy = load_average()
    rows = [measure(n, options.seconds, options.clients, options.method) for n in counts]
    heads = ("replicas", "requests/s", "p50 ms", "p95 ms", "errors")
    text = (
        f"{tabulate(heads, rows)}\n\n"
        f"Model {Settings().model}, `{options.method}`, {len(LABELS)} labels, "
        f"{options.clients} clients, {options.seconds:g} s each; clients, gateway and replicas "
        f"share {os.cpu_count()} cores; load average before the run {busy:.1f}. Made by "
        f"`python -m benchmarks.gateway --replicas {options.replicas} --seconds "
        f"{options.seconds:g} --clients {options.clients} --method {options.method}`."
    )
    print(text)
    if options.write:
        write_section("gateway", text, options.write)


if __name__ == "__main__":
    main()
