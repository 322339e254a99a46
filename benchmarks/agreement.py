"""Count images whose label a half precision leaves as float32 gives it.

    python -m benchmarks.agreement --data PHOTOGRAPHS.parquet --dtype bfloat16 --least 0.99

Both precisions see the same views. The labels are drawn from the names in the data, with the
image's own among them. Ends with status 1 if fewer than `--least` agree.
"""

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from random import Random

from benchmarks.harness.machine import machine
from benchmarks.harness.report import command_line, make_parser
from models.classifier import DefendedClassifier, ImageQuery, Prediction
from models.data import open_dataset
from models.evaluation.scores import wilson
from models.loading import load_classifier


def answer(
    classifier: DefendedClassifier, queries: Sequence[ImageQuery], method: str, views: int
) -> tuple[list[Prediction], float]:
    """The predictions, one query at a time, and the seconds that they took."""
    found: list[Prediction] = []
    start = time.perf_counter()
    for query in queries:
        (batch,) = classifier.prepare([query], method)
        found += classifier.classify(batch, views)
    return found, time.perf_counter() - start


def main(arguments: Sequence[str] | None = None) -> int:
    parser = make_parser("benchmarks.agreement", __doc__)
    add = parser.add_argument
    add("--data", type=Path, required=True, help="parquet or folders")
    add("--model", default="embedded", help="embedded, a directory, or a hub id")
    add("--device", default="cpu", help="cpu, cuda or cuda:N")
    add("--dtype", default="bfloat16", choices=("bfloat16", "float16"))
    add("--methods", nargs="+", default=["plain", "ensemble", "tapt"], help="defenses")
    add("--labels", type=int, default=20, help="labels of each image")
    add("--views", type=int, default=16, help="views of each image")
    add("--limit", type=int, default=None, help="images; all by default")
    add("--least", type=float, default=0.99, help="share that must agree")
    options = parser.parse_args(arguments)
    data = open_dataset(options.data)
    queries = []
    for place, example in enumerate(data.examples(options.limit)):
        others = [name for name in data.names if name != data.names[example.label]]
        labels = [data.names[example.label], *Random(place).sample(others, options.labels - 1)]
        queries.append(ImageQuery(example.pixels, tuple(labels), seed=place))
    whole, half = (
        load_classifier(options.model, device=options.device, dtype=dtype)
        for dtype in ("float32", options.dtype)
    )
    print(f"`{command_line('benchmarks.agreement', arguments)}`\n")
    print("| defense | same label | largest difference of a score | seconds of float32 |")
    print("|---|---|---|---|")
    shares = []
    for method in options.methods:
        expected, full_time = answer(whole, queries, method, options.views)
        found, half_time = answer(half, queries, method, options.views)
        pairs = list(zip(expected, found, strict=True))
        same = sum(int(a.probabilities.argmax() == b.probabilities.argmax()) for a, b in pairs)
        largest = max(float((a.probabilities - b.probabilities).abs().max()) for a, b in pairs)
        share = wilson(same, len(pairs))
        shares.append(share.value)
        agreed = f"{share.value:.1%} ({share.low:.1%} to {share.high:.1%})"
        print(
            f"| `{method}` | {agreed} | {largest:.4f} | {half_time / full_time:.2f} |", flush=True
        )
    print(f"\n{options.dtype} against float32, {len(queries)} images. {machine()}")
    return 0 if min(shares) >= options.least else 1


if __name__ == "__main__":
    sys.exit(main())
