"""The published shape and ours, side by side in one run: ratio, speed, memory, stages.

python -m benchmarks.adaptation --size vit-b-32 --labels 10 100 --batch 1 --repeats 2 --json OUT

Each side runs in a process of its own and the repeats take turns, so that a busy machine slows
both alike. Writes JSON and, beside it, a table in Markdown; fails where a ratio is below
`--min-ratio`.
"""

import argparse
import multiprocessing
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any, Self

from benchmarks.harness.report import DOCS, command_line, make_parser, publish
from models.evaluation.table import tabulate
from models.precision import has_native_bfloat16
from service.worker.process import prepare_torch

SIDES = ("published", "ours")
PAGE = DOCS / "performance.md"
CHUNK = 100  # labels whose graph the published shape holds at once, where all would not fit
PUBLISHED_TEXT_BYTES = 38.5e6  # of the published shape's graph, a label at 77 tokens in fp32


class Side:
    """A process that runs one side; calls of `benchmarks.sides.Bench` go through a pipe."""

    def __init__(self, name: str, case: Any) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._pipe, inside = spawn.Pipe()
        self._process = spawn.Process(target=_work, args=(name, case, inside), daemon=True)
        self._process.start()
        inside.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pipe.close()
        self._process.join(10)
        self._process.kill()

    def call(self, method: str, *arguments: Any) -> Any:
        self._pipe.send((method, arguments))
        try:
            answer = self._pipe.recv()
        except EOFError:
            raise SystemExit(f"a side died in {method}: out of memory?") from None
        if isinstance(answer, Exception):
            raise answer
        return answer


def _work(name: str, case: Any, pipe: "Connection[Any, Any]") -> None:
    from benchmarks.sides import Bench

    bench = Bench(name, case)
    while True:
        try:
            method, arguments = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send(getattr(bench, method)(*arguments))
        except Exception as error:
            pipe.send(error)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All figures of one run."""
    from benchmarks.sides import Case

    own, theirs = options.dtype, options.published_dtype
    first = Case(options.size, options.device, own, 2, 1, options.views, options.steps, chunk=0)
    with ExitStack() as stack:
        sides = {
            name: stack.enter_context(Side(name, replace(first, dtype=dtype)))
            for name, dtype in zip(SIDES, (theirs, own), strict=True)
        }
        machine = sides["ours"].call("machine")
        ceilings = {dtype: sides["ours"].call("ceiling", dtype) for dtype in sorted({own, theirs})}
        agreement = None
        if options.agreement:
            asked = replace(first, labels=options.labels[0]), options.agreement, options.data
            answers = zip(*(side.call("winners", *asked) for side in sides.values()), strict=True)
            agreement = sum(one == other for one, other in answers) / options.agreement
        rows = []
        for labels in options.labels:
            for batch in options.batch:
                case = replace(first, labels=labels, batch=batch, chunk=_chunk(options, labels))
                rows.append(_compare(sides, case, theirs, options.repeats, ceilings))
                print(describe([rows[-1]]), flush=True)
    settings = {k: v for k, v in vars(options).items() if k not in ("json", "section")}
    settings["published_dtype"] = theirs
    return {
        "command": command_line("benchmarks.adaptation"),
        "machine": machine,
        "settings": settings,
        "ceiling_flops": ceilings,
        "agreement": agreement,
        "rows": rows,
    }


def _compare(
    sides: dict[str, Side], case: Any, theirs: str, repeats: int, ceilings: dict[str, float]
) -> dict[str, Any]:
    """One case: both sides warmed up, then in turn."""
    warm = {name: side.call("prepare", case) for name, side in sides.items()}
    runs: dict[str, list[Any]] = {name: [] for name in SIDES}
    for repeat in range(repeats):
        for name in SIDES if repeat % 2 else reversed(SIDES):
            runs[name].append(sides[name].call("run"))
    pairs = list(zip(runs["published"], runs["ours"], strict=True))
    ratios = [(p.seconds - p.extra) / (o.seconds / case.batch) for p, o in pairs]
    apart = [abs(a - b) for a, b in zip(pairs[0][0].scores[0], pairs[0][1].scores[0], strict=True)]
    row: dict[str, Any] = {
        "labels": case.labels,
        "batch": case.batch,
        "chunk": case.chunk,
        "ratio": median(ratios),
        "ratios": ratios,
        "cpu_ratio": median(_processor(p) / (_processor(o) / case.batch) for p, o in pairs),
        "largest_score_difference": max(apart),
    }
    for name, dtype in zip(SIDES, (theirs, case.dtype), strict=True):
        images = case.batch if name == "ours" else 1
        seconds = median(run.seconds for run in runs[name])
        flops, peak = warm[name]
        row[name] = {
            "dtype": dtype,
            "seconds": seconds,
            "extra_seconds": median(run.extra for run in runs[name]),
            "images_per_second": images / seconds,
            "peak_bytes": peak,
            "flops": flops,
            "flops_per_second": flops / seconds,
            "of_ceiling": flops / seconds / ceilings[dtype],
            "stages": {
                k: median(run.stages[k] for run in runs[name]) for k in runs[name][0].stages
            },
        }
    return row


def _processor(run: Any) -> float:
    """Processor seconds without the pass that chunks add; they hold on a busy machine as well."""
    return float(run.cpu_seconds * (1 - run.extra / run.seconds))


def _chunk(options: argparse.Namespace, labels: int) -> int:
    """Labels a chunk of the published shape; 0 where all fit into the memory."""
    import torch

    from models.memory import free_bytes

    if options.device == "cuda" or options.size == "embedded":
        return 0
    if labels <= CHUNK:
        return 0
    needed = labels * PUBLISHED_TEXT_BYTES
    return CHUNK if needed > 0.6 * free_bytes(torch.device("cpu")) else 0


def describe(rows: list[dict[str, Any]]) -> str:
    """The comparison as a table."""
    lines = []
    for row in rows:
        theirs, ours = row["published"], row["ours"]
        note = f" (chunks of {row['chunk']})" if row["chunk"] else ""
        spread = f"{min(row['ratios']):.1f} to {max(row['ratios']):.1f}"
        cells = {
            "labels": str(row["labels"]),
            "batch": str(row["batch"]),
            "published s": f"{theirs['seconds'] - theirs['extra_seconds']:.2f}{note}",
            "ours s": f"{ours['seconds']:.2f}",
            "ratio": f"{row['ratio']:.1f} ({spread})",
            "in operations": f"{operations_ratio(row):.1f}",
            "CPU time ratio": f"{row['cpu_ratio']:.1f}",
            "images/s": f"{ours['images_per_second']:.2f}",
            "published GB": f"{theirs['peak_bytes'] / 1e9:.1f}",
            "ours GB": f"{ours['peak_bytes'] / 1e9:.1f}",
            "published of ceiling": f"{theirs['of_ceiling']:.0%}",
            "ours of ceiling": f"{ours['of_ceiling']:.0%}",
            "scores differ by": f"{row['largest_score_difference']:.0e}",
        }
        lines.append(cells)
    return tabulate(tuple(lines[0]), [tuple(cells.values()) for cells in lines])


def operations_ratio(row: Mapping[str, Any]) -> float:
    """How many times as many floating-point operations the published shape takes for an image.

    It bounds what is exact: a higher ratio of times comes from using the machine better.
    """
    return float(row["published"]["flops"] / (row["ours"]["flops"] / row["batch"]))


def describe_stages(rows: list[dict[str, Any]]) -> str:
    """Where a run's time goes, a column a case."""
    columns = [(name, row) for row in rows for name in SIDES]
    stages = dict.fromkeys(stage for name, row in columns for stage in row[name]["stages"])
    heads = ("seconds", *(f"{name}, {row['labels']} x {row['batch']}" for name, row in columns))
    lines = [
        (stage, *(f"{row[name]['stages'].get(stage, 0):.2f}" for name, row in columns))
        for stage in stages
    ]
    return tabulate(heads, lines)


def write_page(figures: dict[str, Any]) -> str:
    """The run as Markdown: both tables and everything that a figure must name."""
    machine, settings = figures["machine"], figures["settings"]
    ceilings = ", ".join(f"{k} {v / 1e9:.0f}" for k, v in figures["ceiling_flops"].items())
    caption = (
        f"{settings['size']}, {settings['views']} views, {settings['steps']} step, VLI, "
        f"ours {settings['dtype']}, published {settings['published_dtype']}, on "
        f"{machine['accelerator'] or machine['cpu']} ({machine['cores']} cores, "
        f"{machine['threads']} threads), torch {machine['torch']}, transformers "
        f"{machine['transformers']}, Python {machine['python']}. "
        f"Medians of {settings['repeats']} alternating repeats, with the lowest and highest ratio. "
        "In operations: the ratio of floating-point operations, which is what skipping work gains; "
        "more comes from using the machine better. "
        f"Ceiling: the fastest matrix product measured in the run, {ceilings} GFLOP/s. "
        "Both sides predict from view 0. The published side starts from finished views and takes "
        "one image at a time. Ours also makes the views and the undefended answer, and has the "
        "labels' features cached. GB: peak memory of the process, or of the allocator on a GPU. "
        "Where the published side runs in chunks of labels, the extra pass is not counted."
    )
    if figures["agreement"] is not None:
        images = "synthetic" if settings["data"] is None else f"`{Path(settings['data']).name}`"
        caption += (
            f" Our defense gives the same label in {settings['dtype']} as in "
            f"{settings['published_dtype']} for {figures['agreement']:.1%} of "
            f"{settings['agreement']} images ({images}, at most 16 views)."
        )
    made = f"Made by `{figures['command']}`."
    return (
        "\n\n".join([describe(figures["rows"]), caption, describe_stages(figures["rows"]), made])
        + "\n"
    )


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser("benchmarks.adaptation", __doc__)
    add = parser.add_argument
    add("--size", choices=("vit-b-32", "vit-b-16", "embedded"), default="vit-b-32")
    add("--labels", type=int, nargs="+", default=[10, 100])
    add("--batch", type=int, nargs="+", default=[1])
    add("--views", type=int, default=64)
    add("--steps", type=int, default=1)
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--dtype", choices=("fp32", "bf16"), default="fp32", help="of ours")
    add(
        "--published-dtype",
        choices=("fp32", "bf16"),
        help="by default as ours on a GPU, fp32 on a CPU",
    )
    add("--repeats", type=int, default=3)
    add("--min-ratio", type=float, nargs="+", metavar="RATIO", help="one a label count, or one")
    add(
        "--agreement",
        type=int,
        default=0,
        metavar="N",
        help="compare the labels of ours in both precisions on N images",
    )
    add("--data", help="data set of those images; else drawn ones")
    add("--json", type=Path, metavar="OUT", default=Path("runs/benchmarks/adaptation.json"))
    add("--section", help="of docs/performance.md, to be written from this run")
    options = parser.parse_args(arguments)
    if options.min_ratio and len(options.min_ratio) not in (1, len(options.labels)):
        parser.error("--min-ratio takes one ratio, or one a label count")
    if options.views < 10:
        parser.error("the published shape keeps a tenth of the views, and of fewer than 10 none")
    if options.published_dtype is None:
        options.published_dtype = options.dtype if options.device == "cuda" else "fp32"
    if options.agreement and options.published_dtype == options.dtype:
        parser.error("--agreement needs a precision of its own on either side")
    return options


def is_emulated(dtype: str, device: str) -> bool:
    """Whether the device computes `dtype` by emulation, whose times would say nothing of it."""
    return device == "cpu" and dtype == "bf16" and not has_native_bfloat16()


def fall_short(rows: list[dict[str, Any]], labels: list[int], wanted: list[float]) -> list[str]:
    """A sentence for each row below the ratio wanted of its label count."""
    bounds = dict(zip(labels, wanted * len(labels) if len(wanted) == 1 else wanted, strict=True))
    return [
        f"{row['labels']} labels, batch {row['batch']}: ratio {row['ratio']:.2f}, "
        f"wanted {bounds[row['labels']]}"
        for row in rows
        if row["ratio"] < bounds[row["labels"]]
    ]


def main() -> int:
    options = parse()
    if options.section and is_emulated(options.dtype, options.device):
        print(f"The table `{options.section}` stays: this CPU has no bfloat16.", file=sys.stderr)
        return 0
    prepare_torch()
    figures = measure(options)
    publish(figures, write_page(figures), options.json, options.section, PAGE)
    short = fall_short(figures["rows"], options.labels, options.min_ratio or [0.0])
    print("\n".join(short), file=sys.stderr)
    return 1 if short else 0


if __name__ == "__main__":
    sys.exit(main())
