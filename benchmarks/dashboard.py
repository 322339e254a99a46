"""Draw the queries of the dashboard, on a real Prometheus, while the service is overloaded and hit.

python -m benchmarks.dashboard --out docs/figures/dashboard.svg

Photographs arrive as a Poisson process at a service with the default model. For a while attacked
pictures come as well (PGD, transfer, 8/255), then the load triples, and at last the worker is
killed. Matplotlib draws the figure, not Grafana.
"""

import asyncio
import itertools
import math
import os
import signal
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from skimage import data

from benchmarks.harness.load import Record, drive, poisson
from benchmarks.harness.machine import load_average
from benchmarks.harness.prometheus import Prometheus, scrape
from benchmarks.harness.report import make_parser
from benchmarks.harness.requests import classification, encode, post_json
from benchmarks.harness.server import Server
from k8s.monitoring.panels import ROWS, Panel, fill
from service.settings import Settings

LABELS = ["espresso", "cat", "astronaut", "rocket", "dog", "school bus", "lemon", "volleyball"]
METHODS = ["tapt", "tapt", "tapt", "ensemble", "plain"]
EPSILON = 8 / 255
SIDE = 64  # of an attacked picture: that of the package's models
ATTACKED, CROWDED, KILLED = 0.2, 0.4, 0.65  # when, as shares of the run
WINDOW = "20s"
COLUMNS = 4


def ask(picture: NDArray[np.uint8], **defense: object) -> bytes:
    """A classification as it goes over the wire."""
    return post_json(classification(encode(picture), LABELS, **defense))


def photographs() -> list[NDArray[np.uint8]]:
    """Four that scikit-image ships, no larger than a client would send."""
    found = []
    for picture in (data.coffee(), data.chelsea(), data.astronaut(), data.rocket()):
        image = Image.fromarray(picture)
        image.thumbnail((320, 320))
        found.append(np.asarray(image))
    return found


def attack(pictures: Sequence[NDArray[np.uint8]]) -> list[NDArray[np.uint8]]:
    """Attacked on undefended CLIP, away from what it says of them."""
    import torch

    from models.attacks.pgd import ascend
    from models.attacks.threats import transfer
    from models.checkpoint import load_checkpoint
    from models.classifier import DefendedClassifier

    checkpoint = load_checkpoint(Settings().model, torch.device("cpu"))
    model = transfer(DefendedClassifier(checkpoint, None), tuple(LABELS))
    small = [np.asarray(Image.fromarray(picture).resize((SIDE, SIDE))) for picture in pictures]
    pixels = torch.tensor(np.stack(small)).permute(0, 3, 1, 2) / 255
    with torch.no_grad():
        said = model(pixels).argmax(1)
    attacked = ascend(
        pixels,
        lambda at: torch.nn.functional.cross_entropy(model(at), said, reduction="sum"),
        EPSILON,
        steps=20,
        step_size=EPSILON / 8,
        generator=torch.Generator().manual_seed(0),
    )
    return list((attacked * 255).round().byte().permute(0, 2, 3, 1).numpy())


@dataclass(frozen=True, slots=True)
class Traffic:
    """Whole requests: a mix of methods and pictures, attacked pictures, and short deadlines."""

    calm: list[bytes]
    attacked: list[bytes]
    hurried: list[bytes]


def prepare() -> Traffic:
    clean = photographs()
    calm = [ask(picture, method=method) for picture, method in itertools.product(clean, METHODS)]
    return Traffic(
        calm=[*calm, post_json({})],
        attacked=[ask(picture) for picture in attack(clean)],
        hurried=[ask(clean[0], steps=8, deadline_ms=800)],
    )


async def run_scenario(
    server: Server, traffic: Traffic, rate: float, seconds: float
) -> list[Record]:
    """The whole run; the records of every request."""

    async def phase(begin: float, end: float, times: float, requests: list[bytes]) -> list[Record]:
        await asyncio.sleep(begin * seconds)
        arrivals = poisson(times * rate, (end - begin) * seconds, seed=round(100 * begin))
        return await drive(server.url, arrivals, requests)

    async def kill() -> list[Record]:
        await asyncio.sleep(KILLED * seconds)
        os.kill(server.workers()[0], signal.SIGKILL)
        return []

    phases = await asyncio.gather(
        phase(0, 1, 1, traffic.calm),
        phase(ATTACKED, ATTACKED + 0.15, 1, traffic.attacked),
        phase(CROWDED, CROWDED + 0.15, 2, traffic.calm),
        phase(CROWDED, CROWDED + 0.15, 0.5, traffic.hurried),
        kill(),
    )
    return [record for records in phases for record in records]


def draw(prometheus: Prometheus, start: float, end: float, caption: str, out: Path) -> None:
    """All panels but the single number, as small multiples over the same time."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "dashboard", "svg.fonttype": "none"})
    matplotlib.rcParams.update({"font.size": 8, "axes.titlesize": 9, "axes.titleweight": "bold"})
    from matplotlib import pyplot

    panels = [panel for row in ROWS.values() for panel in row if panel.kind != "number"]
    rows = math.ceil(len(panels) / COLUMNS)
    figure, grid = pyplot.subplots(rows, COLUMNS, figsize=(16, 2.6 * rows), sharex=True)
    for axes, panel in itertools.zip_longest(grid.flat, panels):
        if panel is None:
            axes.remove()
            continue
        axes.set_title(panel.title, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
        (_draw_heatmap if panel.kind == "heatmap" else _draw_lines)(
            axes, panel, prometheus, start, end
        )
    figure.supxlabel(caption, fontsize=9)
    figure.tight_layout()
    figure.savefig(out, metadata={"Date": None})
    pyplot.close(figure)


def _series(
    prometheus: Prometheus, expr: str, start: float, end: float
) -> list[tuple[dict[str, str], Any]]:
    """Labels and points [n, 2] of each series: seconds from the start, value."""
    found = prometheus.range(fill(expr, WINDOW), start, end, 2)
    return [
        (one["metric"], np.array(one["values"], dtype=float) - [start, 0])
        for one in found
        if one["values"]
    ]


def _draw_lines(axes: Any, panel: Panel, prometheus: Prometheus, start: float, end: float) -> None:
    scale, unit = {"bytes": (2**20, "MiB"), "percentunit": (0.01, "%")}.get(
        panel.unit, (1, {"s": "s", "reqps": "1/s"}.get(panel.unit, ""))
    )
    for query in panel.queries:
        for metric, points in _series(prometheus, query.expr, start, end):
            legend = query.legend
            for name, value in metric.items():
                legend = legend.replace(f"{{{{{name}}}}}", value)
            axes.plot(points[:, 0], points[:, 1] / scale, linewidth=1.2, label=legend)
    legends = len(axes.get_legend_handles_labels()[1])
    axes.set_ylim(0, axes.get_ylim()[1] * (1.4 if legends > 6 else 1.1))
    axes.set_ylabel(unit)
    if legends:
        axes.legend(frameon=False, fontsize=6.5, ncols=1 + (legends - 1) // 3, loc="upper left")


def _draw_heatmap(
    axes: Any, panel: Panel, prometheus: Prometheus, start: float, end: float
) -> None:
    found = _series(prometheus, panel.queries[0].expr, start, end)
    bounds = sorted((float(metric["le"]), points) for metric, points in found)
    times = bounds[0][1][:, 0]
    cumulative = np.stack([np.interp(times, *points.T) for _, points in bounds])
    counts = np.diff(cumulative, axis=0, prepend=0)
    names = ["inf" if math.isinf(bound) else f"{bound:g}" for bound, _ in bounds]
    axes.pcolormesh(
        times, range(len(names)), counts, cmap="Blues", shading="nearest", rasterized=True
    )
    axes.set_yticks(range(0, len(names), 2), [f"≤ {name}" for name in names[::2]])
    axes.set_ylabel("s")


def main() -> None:
    parser = make_parser("benchmarks.dashboard", __doc__)
    parser.add_argument("--seconds", type=float, default=240)
    parser.add_argument("--rate", type=float, default=1.5, help="requests a second at first")
    parser.add_argument("--out", type=Path, default=Path("docs/figures/dashboard.svg"))
    options = parser.parse_args()
    traffic, load = prepare(), load_average()
    with Server("--max-queue-size", "8") as server, scrape(server.url) as prometheus:
        start = time.time()
        records = asyncio.run(run_scenario(server, traffic, options.rate, options.seconds))
        end = time.time()
        attacked, crowded, killed = (
            share * options.seconds for share in (ATTACKED, CROWDED, KILLED)
        )
        caption = (
            "The dashboard's queries on real Prometheus data, drawn by benchmarks/dashboard.py, "
            f"not by Grafana. {len(records)} requests over {options.seconds:g} s; attacked "
            f"pictures (PGD, transfer, {EPSILON * 255:g}/255)\nfrom {attacked:g} s, overload from "
            f"{crowded:g} s, the worker killed at {killed:g} s. Model {Settings().model}, one "
            f"machine of {os.cpu_count()} CPU cores for all, load average {load:.1f} before the "
            "run."
        )
        draw(prometheus, start, end, caption, options.out)
    print(dict(sorted(Counter(record.status for record in records).items(), key=str)))


if __name__ == "__main__":
    main()
