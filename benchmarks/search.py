"""Search for TAPT's default among recorded configurations, on training photographs.

    python -m benchmarks.search --data DIR/tiny_imagenet_train_3of4.parquet \\
        --bundle views=runs/bundles/views [--threats clean,transfer,adaptive] [--only NAME ...]

Every configuration is one `tapt-serve evaluate` on the same pictures; it goes on after a kill and
adds to what is there. The bundle beside the model is called `own`; a configuration whose bundle is
not given is named and left out. Writes docs/figures/search.json and the part of docs/robustness.md
between the marks `search`. What wins here is measured on validation pictures once, elsewhere.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.sections import write_section
from models.evaluation import command
from models.evaluation.scores import Interval
from models.evaluation.table import percent, tabulate

DOCS = Path(__file__).parent.parent / "docs"
MOST = 60


@dataclass(frozen=True)
class Configuration:
    """A defense, the bundle that it takes its prompts from, and flags of `evaluate`."""

    name: str
    defense: str
    bundle: str
    flags: str = ""


def configurations() -> Iterator[Configuration]:
    """At most `MOST`: the baselines, then one change at a time from the paper's step, then those
    that the leads of single changes suggest together."""
    yield Configuration("mean over views, no prompts", "ensemble", "own")
    for bundle in ("own", "views"):
        yield Configuration(f"{bundle}: no step", "apt-ensemble", bundle)
        step = "--learning-rate 5e-4"
        yield Configuration(f"{bundle}: published step", "tapt", bundle, step)
        yield Configuration(f"{bundle}: single view", "tapt", bundle, f"{step} --readout single")
        for adapts in ("vision", "text"):
            flags = f"--adapts {adapts} --learning-rate 5e-3"
            yield Configuration(f"{bundle}: {adapts} alone, 5e-3", "tapt", bundle, flags)
        vision = "--adapts vision --learning-rate"
        yield Configuration(f"{bundle}: vision alone, 2e-2", "tapt", bundle, f"{vision} 2e-2")
        for name, flags in {
            "entropy alone": "--alignment-weight 0",
            "alignment tenfold": "--alignment-weight 1000",
            "clean statistics alone": "--gamma 0",
            "half of the views kept": "--selection-ratio 0.5",
            "all views kept": "--selection-ratio 1",
            "all views, mean of entropies": "--selection-ratio 1 --entropy mean-of",
            "all views, entropy alone": "--selection-ratio 1 --alignment-weight 0",
            "two steps": "--steps 2",
            "kept views read": "--selection-ratio 0.5 --readout kept",
            "views read by reliability": "--readout weighted",
        }.items():
            every = f"{vision} 5e-3 {flags}"
            yield Configuration(f"{bundle}: vision alone, 5e-3, {name}", "tapt", bundle, every)


def measure(
    configuration: Configuration, bundle: Path, options: argparse.Namespace
) -> list[dict[str, Any]] | None:
    """The rows of one configuration; None where the run was stopped or refused."""
    stem = configuration.name.replace(" ", "-").replace(",", "").replace(":", "")
    out = options.out / f"{stem}.json"
    flags = (
        f"--data {options.data} --bundle {bundle} --defenses {configuration.defense} "
        f"--threats {options.threats} --attacks pgd --eps 2/255 --limit {options.limit} "
        f"--attack-steps {options.attack_steps} --json {out} {configuration.flags}"
    )
    if command.main(flags.split()):
        return None
    rows: list[dict[str, Any]] = json.loads(out.read_text())["rows"]
    return rows


def tell(known: dict[str, Any]) -> str:
    """The table of everything recorded, in Markdown."""
    columns = list(
        dict.fromkeys(
            row["threat"] for configuration in known["rows"].values() for row in configuration
        )
    )
    lines = []
    for name, rows in known["rows"].items():
        found = {row["threat"]: row for row in rows}
        cells = [_cell(found[threat]) if threat in found else "" for threat in columns]
        lines.append((name, *cells, f"{rows[0]['ms_a_picture']:.0f}"))
    heads = (
        "configuration",
        *(threat if threat == "clean" else f"{threat} 2/255" for threat in columns),
        "ms",
    )
    return f"{known['caption']}\n\n{tabulate(heads, lines)}"


def _cell(row: dict[str, Any]) -> str:
    return percent(Interval(row["accuracy"], *row["interval"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="training photographs, parquet")
    parser.add_argument("--bundle", action="append", default=[], metavar="NAME=DIR")
    parser.add_argument("--threats", default="clean,transfer")
    parser.add_argument("--limit", type=int, default=200, help="pictures")
    parser.add_argument("--attack-steps", type=int, default=10)
    parser.add_argument("--only", nargs="*", help="names of configurations; all if absent")
    parser.add_argument("--out", type=Path, default=Path("runs/search"))
    options = parser.parse_args()
    bundles = {"own": "models/embedded/bundle", **dict(b.split("=", 1) for b in options.bundle)}
    path = DOCS / "figures" / "search.json"
    known = json.loads(path.read_text()) if path.exists() else {"rows": {}}
    for configuration in configurations():
        if options.only and configuration.name not in options.only:
            continue
        if configuration.bundle not in bundles:
            print(f"left out, for want of --bundle {configuration.bundle}=: {configuration.name}")
            continue
        print(configuration.name, flush=True)
        rows = measure(configuration, Path(bundles[configuration.bundle]), options)
        if rows is None:
            raise SystemExit(f"{configuration.name} was not measured")
        known["rows"][configuration.name] = rows
        known["caption"] = (
            f"Accuracy in % with 95% intervals on {rows[0]['n']} training photographs of "
            f"`{options.data.name}`, PGD of {options.attack_steps} steps, 16 views unless said; "
            "configurations are chosen here and reported elsewhere."
        )
        path.write_text(json.dumps(known, indent=1) + "\n")
    write_section("search", tell(known), DOCS / "robustness.md")


if __name__ == "__main__":
    main()
