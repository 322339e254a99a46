"""The running server under an open-loop load over real sockets, against its bare engine.

python -m benchmarks.service --seconds 20 --json OUT
python -m benchmarks.service ... -- --workers 2     # knobs of the server after the dashes

Arrival times are fixed beforehand. Single: one request at a time. Saturation: twice the rate of the
bare engine; the surplus is refused. Half load: half of the throughput at saturation, for at least a
thousand requests, because the p99 of a few is their maximum. Writes JSON and, beside it, a table in
Markdown.
"""

import argparse
import asyncio
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import front
from benchmarks.harness.load import Record, drive, percentile, poisson, summarize
from benchmarks.harness.machine import hardware
from benchmarks.harness.report import DOCS, command_line, make_parser, publish
from benchmarks.harness.requests import draw_requests
from benchmarks.harness.server import Server, read_knobs
from benchmarks.isolated import measure_bare
from models.evaluation.table import tabulate
from service.worker.process import prepare_torch

PAGE = DOCS / "performance.md"
PICTURES = 32  # different ones
HALF = 1000  # requests at half load, at least


def measure(options: argparse.Namespace) -> dict[str, Any]:
    settings = read_knobs(options.knobs)
    requests = draw_requests(PICTURES)
    most = settings.max_batch_size
    sizes = [size for size in (1, 2, 4, 8) if size < most] + [most]
    bare = measure_bare(settings, sizes, options.seconds)
    times = {size: median(values) for size, values in bare["times"].items()}
    with Server(*options.knobs) as server:

        def ask(arrivals: Sequence[float]) -> list[Record]:
            return asyncio.run(drive(server.url, arrivals, requests))

        ask([0.0])
        single = [ask([0.0])[0] for _ in range(max(5, int(options.seconds / 2 / times[1])))]
        full = summarize(ask(poisson(2 * bare["rate"], options.seconds, 1)))
        rate = full["throughput"] / 2
        half = summarize(ask(poisson(rate, max(2 * options.seconds, HALF / rate), 2)))
    # The engine again, after the server, so that a machine whose speed drifts favors neither.
    again = measure_bare(settings, [most], options.seconds / 2)
    # In a closed loop, for a fixed rate would be more than a slow machine carries.
    api = front.measure(clients=4, seconds=options.seconds)
    engine_rate = (bare["rate"] + again["rate"]) / 2
    latencies = [record.latency for record in single]
    return {
        "command": command_line("benchmarks.service"),
        "machine": bare["machine"],
        "settings": {name: getattr(settings, name) for name in (
            "model", "method", "steps", "views", "readout", "adapts", "workers",
            "max_batch_size", "max_queue_size")},
        "service_seconds": times,
        "engine_throughput": engine_rate,
        "engine_throughputs": [bare["rate"], again["rate"]],
        "single": {"n": len(single)} | {f"p{p}": percentile(latencies, p / 100)
                                        for p in (50, 95, 99)},
        "saturation": full,
        "half": half,
        "share_of_engine": full["throughput"] / engine_rate,
        "half_p99_of_single": half["p99"] / percentile(latencies, 0.5),
        "api": {"n": api.answered, "cpu_ms": api.api_ms, "decode_ms": api.decode_ms},
    }  # fmt: skip


def describe_requests(settings: Mapping[str, Any]) -> str:
    """What was asked, and with which defense it was answered."""
    workers = settings.get("workers", 1)
    return (
        f"Model {settings['model']}, {workers} worker{'s' * (workers > 1)}, batches of at most "
        f"{settings['max_batch_size']}, `{settings['method']}`, {settings['views']} views, "
        f"{settings['steps']} step on the `{settings['adapts']}` prompts, readout "
        f"`{settings['readout']}`, JPEG of 640 x 480, 10 labels"
    )


def write_page(figures: dict[str, Any]) -> str:
    """The run as Markdown."""
    rows = []
    for name in ("single", "half", "saturation"):
        load = figures[name]
        sent = load.get("sent", load.get("n"))
        lost = f"{load['refused']} refused, {load['failed']} failed" if "sent" in load else ""
        rate = f"{load['throughput']:.2f}" if "throughput" in load else ""
        times = [f"{1000 * load[f'p{p}']:.0f}" for p in (50, 95, 99)]
        rows.append((name, str(sent), rate, *times, lost))
    table = tabulate(("load", "requests", "answers/s", "p50 ms", "p95 ms", "p99 ms", ""), rows)
    machine, settings, api = figures["machine"], figures["settings"], figures["api"]
    workers = figures["settings"]["workers"]
    batches = ", ".join(f"{size}: {1000 * s:.0f}" for size, s in figures["service_seconds"].items())
    text = (
        f"Without a server, the engine processes {figures['engine_throughput']:.2f} images/s in "
        f"full batches; at saturation the server reaches {figures['share_of_engine']:.0%} of that. "
        f"At half load, p99 is {figures['half_p99_of_single']:.1f} times the median of single "
        f"requests. The API process uses {api['cpu_ms']:.1f} ms of CPU time per request "
        f"(n = {api['n']}, with 4 clients and a worker that answers at once), the decoders "
        f"{api['decode_ms']:.1f} ms. Milliseconds per batch of the engine without a server, "
        f"by batch size: {batches}{', with all workers busy' if workers > 1 else ''}."
    )
    caption = (
        f"{describe_requests(settings)}. Client, server and worker share the machine. Arrivals "
        f"are Poisson; latency counts from the scheduled arrival. "
        f"{hardware(machine)}, Python {machine['python']}."
    )
    return "\n\n".join([table, text, caption, f"Made by `{figures['command']}`."]) + "\n"


def main() -> int:
    parser = make_parser("benchmarks.service", __doc__)
    add = parser.add_argument
    add("--seconds", type=float, default=20.0, help="of load at saturation; the others follow")
    add("--json", type=Path, metavar="OUT", default=Path("runs/benchmarks/service.json"))
    add("--section", default="service", help="of docs/performance.md that --write fills")
    add("--write", action="store_true", help="write docs/performance.md from this run")
    add("knobs", nargs="*", help="of the server, after `--`")
    options = parser.parse_args()
    prepare_torch()
    figures = measure(options)
    section = options.section if options.write else None
    publish(figures, write_page(figures), options.json, section, PAGE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
