"""Count images whose label the half precisions leave as float32 gives it.

    python -m benchmarks.agreement --data PHOTOGRAPHS.parquet --limit 500 --write

All precisions see the same views. The labels are drawn from the names in the data, with the
image's own among them. `--write` puts the table into docs/performance.md. Ends with status 1 if
fewer than `--least` agree.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from random import Random

from benchmarks.harness.machine import machine
from benchmarks.harness.report import DOCS, command_line, make_parser, write_section
from models.classifier import DefendedClassifier, ImageQuery, Prediction
from models.data import open_dataset
from models.evaluation.scores import wilson
from models.loading import load_classifier
from models.shipped import DEFAULT_MODEL, SHIPPED

DTYPES = ("bfloat16", "float16")


def answer(
    classifier: DefendedClassifier, queries: Sequence[ImageQuery], method: str, views: int
) -> list[Prediction]:
    """The predictions, one query at a time."""
    found: list[Prediction] = []
    for query in queries:
        (batch,) = classifier.prepare([query], method)
        found += classifier.classify(batch, views)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = make_parser("benchmarks.agreement", __doc__)
    add = parser.add_argument
    add("--data", type=Path, required=True, help="parquet or folders")
    add("--model", default=DEFAULT_MODEL, help=f"{', '.join(SHIPPED)}, a directory, or a hub id")
    add("--device", default="cpu", help="cpu, cuda or cuda:N")
    add("--dtypes", nargs="+", default=DTYPES, choices=DTYPES, help="precisions")
    add("--methods", nargs="+", default=["plain", "ensemble", "tapt"], help="defenses")
    add("--labels", type=int, default=20, help="labels of each image")
    add("--views", type=int, default=16, help="views of each image")
    add("--limit", type=int, default=None, help="size of a random sample; all by default")
    add("--least", type=float, default=0.99, help="share that must agree")
    add("--write", action="store_true", help="write the table into docs/performance.md")
    options = parser.parse_args(arguments)
    whole = load_classifier(options.model, device=options.device, dtype="float32")
    data = open_dataset(options.data)
    queries = []
    examples = data.examples(options.limit, 0, whole.checkpoint.preprocessing)
    for place, example in enumerate(examples):
        others = [name for name in data.names if name != data.names[example.label]]
        labels = [data.names[example.label], *Random(place).sample(others, options.labels - 1)]
        query = ImageQuery(example.pixels, tuple(labels), seed=place, view=example.view)
        queries.append(query)
    lines = [
        "| precision | defense | same label as float32 | largest difference of a score |",
        "|---|---|---|---|",
    ]
    shares = []
    expected = {name: answer(whole, queries, name, options.views) for name in options.methods}
    for dtype in options.dtypes:
        half = load_classifier(options.model, device=options.device, dtype=dtype)
        for method, answers in expected.items():
            pairs = list(zip(answers, answer(half, queries, method, options.views), strict=True))
            same = sum(int(a.probabilities.argmax() == b.probabilities.argmax()) for a, b in pairs)
            largest = max(float((a.probabilities - b.probabilities).abs().max()) for a, b in pairs)
            share = wilson(same, len(pairs))
            shares.append(share.value)
            agreed = f"{share.value:.1%} ({share.low:.1%} to {share.high:.1%})"
            lines.append(f"| {dtype} | `{method}` | {agreed} | {largest:.4f} |")
    lines += [
        "",
        f"Model {whole.checkpoint.name}, {len(queries)} photographs of `{options.data.name}`, "
        f"{options.labels} labels, {options.views} views; 95% intervals. {machine()} Made by "
        f"`{command_line('benchmarks.agreement', arguments)}`.",
    ]
    page = "\n".join(lines)
    print(page)
    if options.write:
        write_section("agreement", page, DOCS / "performance.md")
    return 0 if min(shares) >= options.least else 1


if __name__ == "__main__":
    sys.exit(main())
