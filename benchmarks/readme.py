"""Write the README's answer and table, and tables of docs/robustness.md and docs/performance.md.

python -m benchmarks.readme --image coffee.png       # starts the service and asks it with curl
python -m benchmarks.readme --table OUT.json         # of `tapt-serve evaluate --json OUT.json`
python -m benchmarks.readme --table OUT.json --beside OTHER.json    # and of another model
python -m benchmarks.readme --table OUT.json --into NAME    # a block of docs/robustness.md
python -m benchmarks.readme --table OUT.json --into NAME --beside OTHER.json    # and how far apart
python -m benchmarks.readme --speed DIR              # of what `make benchmark` left in DIR

For the blocks in `WHOLE`, docs/figures gets the outcome of every image and the plot.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.adaptation import operations_ratio
from benchmarks.harness.answer import ask
from benchmarks.harness.report import DOCS, ROOT, make_parser, write_section
from benchmarks.robustness import (
    accuracy_table,
    count,
    detection_table,
    differences_table,
    paired_table,
)
from benchmarks.service import describe_requests
from models.evaluation.table import tabulate
from models.shipped import SHIPPED

README, ROBUSTNESS, FIGURES = ROOT / "README.md", DOCS / "robustness.md", DOCS / "figures"
PERFORMANCE = DOCS / "performance.md"
# Blocks that show the plot and how well attacks are detected.
WHOLE = {"robustness", "adaptive", "strong", "strong-embedded", "every", "every-embedded"}


def headline(figures: dict[str, Any], others: dict[str, Any] | None) -> str:
    """The README's first sentences about robustness: the served defense and undefended CLIP, under
    the adaptive attack and without one; then those of a second model, if there is one."""
    (epsilon,) = {row["epsilon"] for row in figures["rows"] if row["threat"] == "adaptive"}
    text = (
        f"Top-1 accuracy of `{figures['checkpoint']}` on {figures['data']['n']} images when the "
        f"attacker knows the defense and may change each pixel by {epsilon:g}/255: "
        f"{_accuracies(figures)}"
    )
    if others is None:
        return text
    return f"{text} With `{others['checkpoint']}`: {_accuracies(others)}"


def _accuracies(run: dict[str, Any]) -> str:
    """A model's figures for the headline, and what they do not hold for."""
    rows = {(row["defense"], row["threat"]): row for row in run["rows"]}

    def share(defense: str, threat: str) -> str:
        return f"{100 * rows[defense, threat]['accuracy']:.0f}%"

    attacked, alone = rows["tapt", "adaptive"], rows["plain", "adaptive"]
    text = (
        f"{share('tapt', 'adaptive')} ({share('tapt', 'clean')} without an attack); without "
        f"the defense {share('plain', 'adaptive')} ({share('plain', 'clean')})."
    )
    if (asked := attacked.get("answers", 1)) > 1:
        kept = attacked["all_right"]["value"]
        gain = "" if kept > alone["accuracy"] else ", no more than without the defense"
        text += f" An attacker who may ask {asked} times gets it down to {100 * kept:.0f}%{gain}."
    shipped = _shipped(run["checkpoint"])
    if shipped and (run["settings"]["bundle"] or {}).get("prompts_sha256") != shipped:
        text += " This was measured with another bundle than the one that ships."
    return text


def _shipped(model: str) -> str | None:
    """The hash of the prompts that ship with a model; None if it is not part of the package."""
    if model not in SHIPPED:
        return None
    bundle = json.loads((SHIPPED[model] / "bundle" / "bundle.json").read_text())
    return str(bundle["prompts_sha256"])


def speed_table(adaptation: dict[str, Any], service: dict[str, Any]) -> str:
    """Time of one adaptation beside the published computation, and the speed of the server."""
    lines = []
    for row in adaptation["rows"]:
        ours, theirs = row["ours"], row["published"]
        low, high = min(row["ratios"]), max(row["ratios"])
        gigabytes = f"{ours['peak_bytes'] / 1e9:.1f} ({theirs['peak_bytes'] / 1e9:.1f})"
        spent = [side["seconds"] - side["extra_seconds"] for side in (ours, theirs)]
        seconds = f"{spent[0]:.1f} ({spent[1]:.1f})"
        ratio = f"{row['ratio']:.1f} ({low:.1f} to {high:.1f})"
        operations = f"{operations_ratio(row):.1f}"
        lines.append((f"{row['labels']:,}", seconds, ratio, operations, gigabytes))
    heads = ("labels", "seconds (published)", "speedup", "in operations", "peak GB (published)")
    settings, machine = adaptation["settings"], adaptation["machine"]
    single, full = service["single"], service["saturation"]
    text = (
        f"Adapting to one image: {settings['size']}, {settings['views']} views, "
        f"{count(settings['steps'], 'step')}, {settings['dtype']}, visual and text prompts. In "
        "parentheses is our own implementation of the published computation: one image at a time, "
        "gradients through all views, the full text. It gives the same answer. Where it does not "
        "fit into memory it runs in chunks of labels, and the extra pass is not counted. In "
        "operations: how many times fewer floating-point operations ours takes. "
        f"{machine['cpu']}, {machine['cores']} cores, torch {machine['torch']}; medians of "
        f"{settings['repeats']} alternating runs. Made by `{adaptation['command']}`."
    )
    asked = describe_requests(service["settings"])
    served = (
        "The server on the same machine: one request at a time takes "
        f"{1000 * single['p50']:.0f} ms at p50 and {1000 * single['p99']:.0f} ms at p99 "
        f"(n = {single['n']}); at saturation it answers {full['throughput']:.1f} requests a "
        f"second, {service['share_of_engine']:.0%} of the engine without a server. {asked}. "
        f"Made by `{service['command']}`."
    )
    made = "Both are extracts of these runs by `python -m benchmarks.readme --speed DIR`."
    return "\n\n".join([tabulate(heads, lines), text, f"{served} {made}"])


def copy_figures(table: Path, name: str) -> str:
    """Copy figures and plot to docs/figures under this name; the plot in Markdown."""
    for kind in (".json", ".svg"):
        (FIGURES / f"{name}{kind}").write_bytes(table.with_suffix(kind).read_bytes())
    return f"![Accuracy over epsilon, one panel per threat model](figures/{name}.svg)"


def check_replaces(figures: dict[str, Any], page: str, name: str) -> None:
    """Raises SystemExit if a page's block was measured on more images, or on other ones."""
    block = re.search(rf"<!-- {name} -->\n(.*?)<!-- /{name} -->", page, re.DOTALL)
    published = block and re.search(r"the same (\d+) images of\s+`([^`]+)`", block[1])
    if published is None:
        return
    count, data = int(published[1]), published[2]
    if figures["data"]["n"] < count or figures["data"]["name"] != data:
        raise SystemExit(
            f"{name} shows {count} images of {data}; these figures are of {figures['data']['n']} "
            f"images of {figures['data']['name']}. Add --force to replace it."
        )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser("benchmarks.readme", __doc__)
    parser.add_argument("--image", type=Path, help="a photograph of a cup of coffee")
    parser.add_argument("--table", type=Path, help="figures of `tapt-serve evaluate`")
    parser.add_argument("--beside", type=Path, help="figures of the same images, to compare")
    parser.add_argument("--speed", type=Path, help="folder of what `make benchmark` measured")
    parser.add_argument("--into", help="a block of docs/robustness.md instead of the README's")
    parser.add_argument(
        "--force", action="store_true", help="replace figures of more images, or of other ones"
    )
    options = parser.parse_args(arguments)
    if options.image:
        write_section("answer", ask(options.image), README)
    if options.speed:
        runs = (options.speed / name for name in ("vit-b-32-fp32.json", "service.json"))
        write_section(
            "speed", speed_table(*(json.loads(run.read_text()) for run in runs)), PERFORMANCE
        )
    if options.table:
        figures = json.loads(options.table.read_text())
        if not options.force:
            page = ROBUSTNESS if options.into else README
            check_replaces(figures, page.read_text(), options.into or "table")
        if options.into:
            parts = [accuracy_table(figures), differences_table(figures)]
            if options.beside:
                parts += [paired_table(figures, json.loads(options.beside.read_text()))]
            if options.into in WHOLE:
                parts += [detection_table(figures), copy_figures(options.table, options.into)]
            write_section(options.into, "\n\n".join(filter(None, parts)), ROBUSTNESS)
        else:
            write_section("table", accuracy_table(figures, short=True), README)
            others = json.loads(options.beside.read_text()) if options.beside else None
            write_section("headline", headline(figures, others), README)


if __name__ == "__main__":
    main()
