"""The comparison as tables for docs/performance.md and as a sentence for the README.

A row is what `benchmarks.peers.__main__.measure` made of a peer: `runs` holds its trials, `error`
the reason why it has none.
"""

from collections.abc import Sequence
from statistics import median
from typing import Any

from benchmarks.peers.trial import CLIENTS, OPEN, PHOTOGRAPHS
from models.evaluation.table import tabulate

BASE = "pipeline"  # the peer that ratios are against
ONE, MANY = CLIENTS
LOADS = (ONE, MANY, OPEN)
Row = dict[str, Any]
Rows = Sequence[Row]


def write_page(figures: dict[str, Any], size: str) -> str:
    """What a run measured with one checkpoint, as Markdown."""
    rows, settings = figures["sizes"][size], figures["settings"]
    caption = (
        f"Checkpoint `{size}`. n: answers in all loads and repeats. Photographs as JPEG of 640 x "
        "480, 10 labels, every server with its default settings, clients on the same machine. The "
        "checkpoint is float32, and tapt-serve may choose bfloat16 for it. Medians of "
        f"{settings['repeats']} alternating repeats of {settings['seconds']:g} s a load. Ratios "
        "are of answers/s within one repeat, with the lowest and the highest. Closed loops: each "
        "client waits for its answer before it asks again. Open loop: Poisson arrivals at 80% of "
        "the best closed loop. CPU time (with 16 clients) and peak memory (proportional set size) "
        "are of all processes of a server. infinity-emb embeds the image only: its client would "
        "embed the labels once and compare, which is not measured. Labels agree: photographs, of "
        f"{len(PHOTOGRAPHS)}, that get the label that the pipeline gives, for undefended servers. "
    )
    installed = ". ".join(filter(None, map(_versions, rows)))
    made = f"Made by `{figures['command']}`."
    below = f"{caption}{installed}. {figures['machine']}"
    return "\n\n".join([speed_table(rows), ratio_table(rows), below, made]) + "\n"


def _versions(row: Row) -> str:
    named = ", ".join(f"{name} {version}" for name, version in row["versions"].items())
    return f"{row['title']}: {named}" if named else ""


def speed_table(rows: Rows) -> str:
    """What each server did, or why it did nothing."""
    times = [f"{load}: {one}" for load in LOADS for one in ("answers/s", "p50 ms", "p99 ms")]
    heads = ("server", "precision", "n", *times, "CPU ms per answer", "peak MB", "labels agree")
    base = find(rows, BASE)
    lines = []
    for row in rows:
        if row["error"]:
            lines.append((row["title"], "", "0", row["error"], *[""] * (len(heads) - 4)))
            continue
        loads = [load for run in row["runs"] for load in run["loads"].values()]
        chosen = " or ".join(sorted({run["precision"] for run in row["runs"]}))
        cells = [chosen, f"{sum(load['answered'] for load in loads)}"]
        for load in LOADS:
            rate, p50, p99 = (
                median(run["loads"][load][field] for run in row["runs"])
                for field in ("throughput", "p50", "p99")
            )
            cells += [f"{rate:.2f}", f"{1000 * p50:.0f}", f"{1000 * p99:.0f}"]
        cpu = median(run["cpu_seconds"] for run in row["runs"])
        peak = max(run["peak_bytes"] for run in row["runs"])
        agree = "" if row["defended"] or base is None else _agreement(row, base)
        lines.append((row["title"], *cells, f"{1000 * cpu:.1f}", f"{peak / 1e6:.0f}", agree))
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
    return tabulate((*heads, f"pipeline answers in the time of one, {MANY}"), lines)


def _spread(values: Sequence[float]) -> str:
    return f"{median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def headline(figures: dict[str, Any], size: str) -> str:
    """The README's sentence: `plain` against each peer, and what a defended answer costs.

    Raises:
        ValueError: `plain` or the pipeline was not measured.
    """
    rows = figures["sizes"][size]
    plain, base = find(rows, "plain"), find(rows, BASE)
    if plain is None or base is None:
        raise ValueError("the sentence needs the peers `plain` and `pipeline`")

    def faster(row: Row) -> str:
        one, many = (f"{median(ratios(plain, row, load)):.1f}" for load in (ONE, MANY))
        return f"{one} and {many} times as many as {row['title']}"

    def price(row: Row) -> str:
        return f"{1 / median(ratios(row, base, MANY)):.1f} with `{row['name']}`"

    own, theirs = plain["runs"][0]["precision"], base["runs"][0]["precision"]
    chosen = "" if own == theirs else f" (tapt-serve in {own}, the others in {theirs})"
    measured = [row for row in rows if not row["error"]]
    others = "; ".join(faster(row) for row in measured if row["own_environment"])
    prices = ", ".join(price(row) for row in measured if row["defended"])
    failed = "".join(f"{row['title']}: {row['error']}. " for row in rows if row["error"])
    return (
        f"Checkpoint `{size}`{chosen}: answers per second of undefended tapt-serve with {ONE} and "
        f"with {MANY}: {others}. With {MANY}, a defended answer takes "
        f"the time of this many undefended ones of {base['title']}: {prices}. {failed}".strip()
    )
