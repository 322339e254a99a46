"""Search for TAPT's default among recorded configurations, on training photographs.

    python -m research.search --data DIR/tiny_imagenet_train_3of4.parquet \\
        --bundle single=DIR [--threats clean,transfer] [--only NAME ...] [--jobs 2]

Every configuration is one `tapt-serve evaluate` of the model `embedded` on the same pictures; it
goes on after a kill and adds to what is there. The bundle beside the model is called `own`, one
learned through single views as published `single`, one learned as `own` on attacked pictures for
the most part `attacked`; a configuration whose bundle is not given is named and left out. Writes
docs/figures/search.json and the part of docs/robustness.md between the marks `search`. What wins
here is measured on validation pictures once, elsewhere.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness.report import write_section
from models.evaluation.scores import Interval, difference
from models.evaluation.table import percent, read_shares, tabulate

DOCS = Path(__file__).parent.parent / "docs"
MOST = 60
BASELINE = "mean over views, no prompts"


@dataclass(frozen=True)
class Configuration:
    """A defense, the bundle that it takes its prompts from, and flags of `evaluate`."""

    name: str
    defense: str
    bundle: str
    flags: str = ""


def configurations() -> Iterator[Configuration]:
    """At most `MOST`: the baselines, at equal cost too; how much of the picture a view shows;
    prompts learned in other ways; then one change at a time from the published step on the model's
    own prompts."""
    yield Configuration(BASELINE, "ensemble", "own")
    yield Configuration("mean over 64 views, no prompts", "ensemble", "own", "--views 64")
    for area in ("0.08,0.5", "0.2,0.6", "0.3,1"):
        flags, share = f"--view-area {area}", area.replace(",", " to ")
        yield Configuration(f"{BASELINE}, views of {share}", "ensemble", "own", flags)
        yield Configuration(f"own: no step, views of {share}", "apt-ensemble", "own", flags)
    yield Configuration("own: no step, 64 views", "apt-ensemble", "own", "--views 64")
    published = "--adapts all --learning-rate 5e-4"
    alone = "--adapts vision --learning-rate 5e-3"
    for bundle in ("single", "attacked", "own"):
        yield Configuration(f"{bundle}: no step", "apt-ensemble", bundle)
        flags = f"{published} --readout single"
        yield Configuration(f"{bundle}: published step, single view", "tapt", bundle, flags)
    for bundle in ("attacked", "own"):
        yield Configuration(f"{bundle}: published step", "tapt", bundle, published)
        yield Configuration(f"{bundle}: vision alone, 5e-3", "tapt", bundle, alone)
    yield Configuration("own: gated by padding, published step", "gate", "own", published)
    yield Configuration("own: few views where they agree", "thrift", "own", published)
    for rate in ("5e-4", "1e-2", "2e-2"):
        flags = f"--adapts vision --learning-rate {rate}"
        yield Configuration(f"own: vision alone, {rate}", "tapt", "own", flags)
    flags = "--adapts text --learning-rate 5e-3"
    yield Configuration("own: text alone, 5e-3", "tapt", "own", flags)
    for name, flags in {
        "single view": "--readout single",
        "entropy alone": "--alignment-weight 0",
        "alignment tenfold": "--alignment-weight 1000",
        "clean statistics alone": "--gamma 0",
        "half of the views kept": "--selection-ratio 0.5",
        "all views kept": "--selection-ratio 1",
        "all views kept, single view read": "--selection-ratio 1 --readout single",
        "all views, mean of entropies": "--selection-ratio 1 --entropy mean-of",
        "all views, entropy alone": "--selection-ratio 1 --alignment-weight 0",
        "two steps": "--steps 2",
        "half kept and read": "--selection-ratio 0.5 --readout kept",
        "views read by reliability": "--readout weighted",
    }.items():
        yield Configuration(f"own: vision alone, 5e-3, {name}", "tapt", "own", f"{alone} {flags}")


def measure(
    configuration: Configuration, bundle: Path, options: argparse.Namespace
) -> dict[str, Any] | None:
    """The figures of one configuration; None where the run was stopped or refused. It runs in a
    process of its own with its share of the threads: small batches gain little from a second."""
    stem = configuration.name.replace(" ", "-").replace(",", "").replace(":", "")
    out = options.out / f"{stem}.json"
    flags = (
        f"--model embedded --bundle {bundle} --data {options.data} "
        f"--defenses {configuration.defense} --threats {options.threats} "
        f"--attacks pgd --eps 2/255 --limit {options.limit} "
        f"--attack-steps {options.attack_steps} --json {out} {configuration.flags}"
    )
    threads = str(max(1, (os.cpu_count() or 1) // options.jobs))
    run = [sys.executable, "-m", "models.evaluation.command", *flags.split()]
    environment = {"OMP_NUM_THREADS": threads, **os.environ}
    if subprocess.run(run, env=environment, stdout=subprocess.DEVNULL).returncode:
        return None
    figures: dict[str, Any] = json.loads(out.read_text())
    return figures


def describe_run(figures: dict[str, Any]) -> dict[str, Any]:
    """What all rows of a table have in common, beside the prompts of each bundle: rows of other
    pictures, weights, attacks or code cannot be compared."""
    settings = figures["settings"]
    pictures = hashlib.sha256("".join(figures["pictures"]).encode()).hexdigest()[:16]
    return {
        "data": figures["data"],
        "pictures": pictures,
        "checkpoint": settings["checkpoint_sha256"],
        "attack": settings["attack"],
        "code": settings["code_sha256"],
    }


def render_table(known: dict[str, Any]) -> str:
    """The table of everything recorded, in Markdown, with paired differences from the baseline."""
    found = {name: {row["threat"]: row for row in rows} for name, rows in known["rows"].items()}
    threats = list(dict.fromkeys(threat for rows in found.values() for threat in rows))
    base = found.get(BASELINE, {})
    lines = []
    for name, rows in found.items():
        cells = [_cell(rows[threat]) if threat in rows else "" for threat in threats]
        beyond = [
            _points(rows[threat], base[threat]) if threat in rows and threat in base else ""
            for threat in threats
        ]
        ms = next(iter(rows.values()))["ms_a_picture"]
        lines.append((name, *cells, *beyond, f"{ms:.0f}"))
    heads = [threat if threat == "clean" else f"{threat} 2/255" for threat in threats]
    differences = [f"{threat}, against the first row" for threat in threats]
    table = tabulate(("configuration", *heads, *differences, "ms"), lines)
    data, attack = known["run"]["data"], known["run"]["attack"]
    caption = (
        f"Accuracy in % with 95% intervals on {data['n']} training photographs of "
        f"`{data['name']}`; PGD with {attack['steps']} steps; 16 views unless stated; paired "
        "differences in points. Configurations are chosen on these images and reported on others. "
        "Milliseconds are rough, because other jobs ran at the same time."
    )
    return f"{caption}\n\n{table}"


def _points(row: dict[str, Any], base: dict[str, Any]) -> str:
    """The paired difference of two rows in points."""
    far = difference(read_shares(row), read_shares(base))
    return f"{100 * far.value:+.1f} ({100 * far.low:+.1f} to {100 * far.high:+.1f})"


def _cell(row: dict[str, Any]) -> str:
    return percent(Interval(row["accuracy"], *row["interval"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="training photographs, parquet")
    parser.add_argument("--bundle", action="append", default=[], metavar="NAME=DIR")
    parser.add_argument("--threats", default="clean,transfer")
    parser.add_argument("--limit", type=int, default=200, help="images")
    parser.add_argument("--attack-steps", type=int, default=10)
    parser.add_argument("--only", nargs="*", help="names of configurations; all if absent")
    parser.add_argument("--jobs", type=int, default=1, help="configurations at a time")
    parser.add_argument("--out", type=Path, default=Path("runs/search"))
    options = parser.parse_args()
    bundles = {"own": "models/embedded/bundle", **dict(b.split("=", 1) for b in options.bundle)}
    path = DOCS / "figures" / "search.json"
    known = json.loads(path.read_text()) if path.exists() else {"rows": {}}
    chosen = [c for c in configurations() if not options.only or c.name in options.only]
    for lacking in (c for c in chosen if c.bundle not in bundles):
        print(f"left out, for want of --bundle {lacking.bundle}=: {lacking.name}")
    with ThreadPoolExecutor(options.jobs) as pool:
        running = {
            pool.submit(measure, c, Path(bundles[c.bundle]), options): c
            for c in chosen
            if c.bundle in bundles
        }
        for done in as_completed(running):
            configuration, figures = running[done], done.result()
            name = configuration.name
            if figures is None:
                pool.shutdown(cancel_futures=True)
                raise SystemExit(f"{name} was not measured")
            run = describe_run(figures)
            prompts = figures["settings"]["bundle"]["prompts_sha256"]
            same = known.setdefault("prompts", {}).setdefault(configuration.bundle, prompts)
            if known.setdefault("run", run) != run or same != prompts:
                pool.shutdown(cancel_futures=True)
                raise SystemExit(f"{path} holds figures of another run; remove it to begin anew")
            print(name, flush=True)
            known["rows"][name] = figures["rows"]
            path.write_text(json.dumps(known, indent=1) + "\n")
    order = [c.name for c in configurations()]
    known["rows"] = {name: known["rows"][name] for name in order if name in known["rows"]}
    path.write_text(json.dumps(known, indent=1) + "\n")
    write_section("search", render_table(known), DOCS / "robustness.md")


if __name__ == "__main__":
    main()
