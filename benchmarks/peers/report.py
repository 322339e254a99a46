"""The comparison as tables for docs/performance.md and as a sentence for the README.

A row is what `benchmarks.peers.__main__.measure` made of a peer: `runs` holds its trials, `error`
the reason why it has none.
"""

from collections.abc import Sequence
from statistics import median
from typing import Any

from benchmarks.peers.trial import CLIENTS, OPEN
from models.evaluation.table import tabulate

BASE = "pipeline"  # the peer that ratios are against
ONE, MANY = CLIENTS
LOADS = (ONE, MANY, OPEN)
Row = dict[str, Any]
Rows = Sequence[Row]


def write_page(figures: dict[str, Any]) -> str:
    """The run as Markdown."""
    parts = []
    for size, rows in figures["sizes"].items():
        parts += [f"Checkpoint `{size}`:", speed_table(rows), ratio_table(rows)]
    settings = figures["settings"]
    caption = (
        "JPEG of 640 x 480, 10 labels, float32, every server with its default settings, clients "
        f"on the same machine. Medians of {settings['repeats']} alternating repeats of "
        f"{settings['seconds']:g} s a load. Ratios are of answers/s within one repeat, with the "
        "lowest and the highest. The clients of the closed loops wait for an answer before they "
        "ask again. The open loop has Poisson arrivals at 80% of the best closed loop. CPU time "
        "is of an answer to 16 clients; CPU time and peak memory (proportional set size) are of "
        "all processes of a server. infinity-emb embeds the image only: its client would embed "
        "the labels once and compare, which is not measured. Labels agree: images of 16 that get "
        "the label that the pipeline gives, for undefended servers. "
    )
    installed = ". ".join(filter(None, map(_versions, next(iter(figures["sizes"].values())))))
    made = f"Made by `{figures['command']}`."
    return "\n\n".join([*parts, f"{caption}{installed}. {figures['machine']}", made]) + "\n"


def _versions(row: Row) -> str:
    named = ", ".join(f"{name} {version}" for name, version in row["versions"].items())
    return f"{row['title']}: {named}" if named else ""


def speed_table(rows: Rows) -> str:
    """What each server did, or why it did nothing."""
    times = [f"{load}: {one}" for load in LOADS for one in ("answers/s", "p50 ms", "p99 ms")]
    heads = ("server", *times, "CPU ms per answer", "peak MB", "labels agree")
    base = find(rows, BASE)
    lines = []
    for row in rows:
        if row["error"]:
            lines.append((row["title"], row["error"], *[""] * (len(heads) - 2)))
            continue
        cells = []
        for load in LOADS:
            rate, p50, p99 = (
                median(run["loads"][load][field] for run in row["runs"])
                for field in ("throughput", "p50", "p99")
            )
            cells += [f"{rate:.2f}", f"{1000 * p50:.0f}", f"{1000 * p99:.0f}"]
        cpu = median(run["cpu_seconds"] for run in row["runs"])
        peak = max(run["peak_bytes"] for run in row["runs"])
        agree = "" if row["defended"] or base is None else _agreement(row, base)
        lines.append((row["title"], *cells, f"{1000 * cpu:.0f}", f"{peak / 1e6:.0f}", agree))
    return tabulate(heads, lines)


def _agreement(row: Row, base: Row) -> str:
    own, theirs = row["runs"][0]["labels"], base["runs"][0]["labels"]
    return f"{sum(map(str.__eq__, own, theirs))}"


def find(rows: Rows, name: str) -> Row | None:
    """The row of a peer that was measured; None if there is none."""
    return next((row for row in rows if row["name"] == name and not row["error"]), None)


def ratios(row: Row, base: Row, load: str) -> list[float]:
    """How many times as many answers/s as `base`, in each repeat."""
    return [
        own["loads"][load]["throughput"] / theirs["loads"][load]["throughput"]
        for own, theirs in zip(row["runs"], base["runs"], strict=True)
    ]


def ratio_table(rows: Rows) -> str:
    """Each server against the pipeline; empty if that was not measured."""
    base = find(rows, BASE)
    if base is None:
        return ""
    lines = []
    for row in rows:
        if row is base or row["error"]:
            continue
        found = [ratios(row, base, load) for load in (ONE, MANY)]
        price = [1 / ratio for ratio in found[1]]
        lines.append((row["title"], *map(_spread, [*found, price])))
    heads = ("server", *(f"times the pipeline, {load}" for load in (ONE, MANY)))
    return tabulate((*heads, "pipeline answers in the time of one"), lines)


def _spread(values: Sequence[float]) -> str:
    return f"{median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def headline(figures: dict[str, Any]) -> str:
    """The README's sentence: `plain` against each peer, and what a defended answer costs.

    Raises:
        ValueError: `plain` or the pipeline was not measured.
    """
    size, rows = next(iter(figures["sizes"].items()))
    plain, base = find(rows, "plain"), find(rows, BASE)
    if plain is None or base is None:
        raise ValueError("the sentence needs the peers `plain` and `pipeline`")

    def times(row: Row, other: Row, load: str) -> str:
        return f"{median(ratios(row, other, load)):.1f}"

    peers = [row for row in rows if row["own_environment"] and not row["error"]]
    faster = ", ".join(
        f"{times(plain, row, ONE)} and {times(plain, row, MANY)} times as many as {row['title']}"
        for row in peers
    )
    price = ", ".join(
        f"{1 / median(ratios(row, base, MANY)):.1f} with `{row['name']}`"
        for row in rows
        if row["defended"] and not row["error"]
    )
    failed = "; ".join(f"{row['title']} {row['error']}" for row in rows if row["error"])
    return (
        f"Beside other servers on the same machine (checkpoint `{size}`, 1 client and 16 clients): "
        f"undefended, tapt-serve gives {faster} answers a second. One defended answer takes the "
        f"time of {price} undefended answers of the pipeline. "
        + (f"Not compared: {failed}. " if failed else "")
        + "More under [performance](docs/performance.md#beside-other-servers)."
    )
