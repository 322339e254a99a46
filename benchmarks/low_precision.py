"""Half precision, int8 and torch.compile for the pass that needs no gradient.

    python -m benchmarks.low_precision --data IMAGES.parquet
    python -m benchmarks.low_precision --size vit-b-32            # random weights: time only

The pass encodes all views of an image with the learned prompts. Its features choose the confident
views, and are the whole answer of a defense without steps. Each variant is timed in turn with
float32, on the same views. With images, it is also compared with float32 in the label of the mean
prediction, in the views that count as confident, and in its accuracy on images that the transfer
attack changed.
"""

import argparse
import copy
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn

from benchmarks.harness.machine import machine
from benchmarks.harness.report import DOCS, command_line, make_parser, write_section
from benchmarks.sides import build_classifier, draw_image
from models.attacks.attack import Budget
from models.attacks.pgd import pgd
from models.attacks.threats import transfer
from models.blocks import QUICK
from models.classifier import DefendedClassifier
from models.clip import PromptedCLIP
from models.data import open_dataset
from models.evaluation.scores import wilson
from models.evaluation.table import tabulate
from models.readout import mean_prediction
from models.tapt import select_confident
from models.views import make_views
from service.worker.process import prepare_torch

BUDGET = Budget(2 / 255)
WARM_UP = 3
CPU = torch.device("cpu")

Encode = Callable[[Tensor, Tensor | None], Tensor]
"""Features [1, V, D] of views [1, V, 3, S, S] with visual prompts."""


class QuickGELU(nn.Module):
    """CLIP's activation, for layers whose weights cannot be folded."""

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens * (QUICK * tokens).sigmoid()


def encode_with(clip: PromptedCLIP) -> Encode:
    return lambda views, prompts: clip.encode_images(views, prompts).features


def bfloat16(clip: PromptedCLIP) -> Encode:
    half = copy.deepcopy(clip)
    half.convert(torch.bfloat16)
    return encode_with(half)


def compiled(clip: PromptedCLIP) -> Encode:
    found: Encode = torch.compile(encode_with(copy.deepcopy(clip)), dynamic=False)
    return found


def compiled_bfloat16(clip: PromptedCLIP) -> Encode:
    found: Encode = torch.compile(bfloat16(clip), dynamic=False)
    return found


def int8(clip: PromptedCLIP) -> Encode:
    """The linear layers of the image tower in int8, scaled anew for each call."""
    small = copy.deepcopy(clip)
    for block in small.model.vision_model.encoder.layers:
        block.mlp.activation_fn = QuickGELU()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao is deprecated, but ships with torch
        small.model.vision_model = torch.ao.quantization.quantize_dynamic(
            small.model.vision_model, {nn.Linear}, dtype=torch.qint8
        )
    return encode_with(small)


VARIANTS: Mapping[str, Callable[[PromptedCLIP], Encode]] = {
    "bfloat16": bfloat16,
    "compiled": compiled,
    "compiled bfloat16": compiled_bfloat16,
    "int8": int8,
}


@dataclass(frozen=True, slots=True)
class Reading:
    """What a variant makes of an image: its label, and the confident views."""

    label: int
    kept: tuple[int, ...]


class Subject:
    """The classifier in float32 and its variants, with prompts and labels in place."""

    def __init__(
        self, classifier: DefendedClassifier, names: Sequence[str], variants: Sequence[str]
    ) -> None:
        self.classifier = classifier
        self.names = tuple(names)
        clip = classifier.checkpoint.clip
        self.encoded = classifier.encoder.encode(self.names, None, "learned")
        self.encoders = {"float32": encode_with(clip)}
        self.encoders |= {name: VARIANTS[name](clip) for name in variants}

    def encode(self, name: str, views: Tensor) -> Tensor:
        with torch.no_grad():
            return self.encoders[name](views.unsqueeze(0), self.encoded.prompts.vision)

    def read(self, name: str, views: Tensor) -> Reading:
        """The answer of a variant to one image's views [V, 3, S, S]."""
        clip, encoded = self.classifier.checkpoint.clip, self.encoded
        logits = clip.class_logits(self.encode(name, views), encoded.features, encoded.batch)
        kept = select_confident(logits, self.classifier.selection_ratio)[0]
        return Reading(int(mean_prediction(logits).argmax()), tuple(sorted(kept.tolist())))

    def attack(self, views: Tensor, label: int, seed: int) -> Tensor:
        """View 0, [1, 3, S, S], moved by PGD on undefended CLIP in float32."""
        model = transfer(self.classifier, self.names)
        return pgd(model, views[:1], torch.tensor([label]), BUDGET, [seed])


def time_variants(subject: Subject, views: Tensor, rounds: int) -> dict[str, list[float]]:
    """Seconds of each variant, in turn, `rounds` times after a warm-up."""
    seconds: dict[str, list[float]] = {name: [] for name in subject.encoders}
    for number in range(WARM_UP + rounds):
        for name, runs in seconds.items():
            start = time.perf_counter()
            subject.encode(name, views)
            if number >= WARM_UP:
                runs.append(time.perf_counter() - start)
    return seconds


def read_images(subject: Subject, options: argparse.Namespace) -> Iterator[tuple[Tensor, int]]:
    """Views and label of each image; then of the first `options.attacked` ones, under
    attack."""
    checkpoint = subject.classifier.checkpoint
    data = open_dataset(options.data)
    chosen = list(data.examples(options.images, seed=0))
    for place, example in enumerate(chosen):
        yield (
            make_views(example.pixels, options.views, place, checkpoint.preprocessing, CPU),
            (example.label),
        )
    for place, example in enumerate(chosen[: options.attacked]):
        first = make_views(example.pixels, 1, place, checkpoint.preprocessing, CPU)
        moved = (subject.attack(first, example.label, place)[0] * 255).round()
        yield make_views(moved, options.views, place, checkpoint.preprocessing, CPU), example.label


def percent(count: int, total: int) -> str:
    share = wilson(count, total)
    return f"{share.value:.1%} ({share.low:.1%} to {share.high:.1%})"


def compare(subject: Subject, options: argparse.Namespace) -> dict[str, list[str]]:
    """For each variant: agreement of labels and of confident views, accuracy under attack."""
    labels: list[int] = []
    readings: dict[str, list[Reading]] = {name: [] for name in subject.encoders}
    for views, label in read_images(subject, options):
        labels.append(label)
        for name, found in readings.items():
            found.append(subject.read(name, views))
    count = len(labels) - options.attacked
    cells = {}
    for name, found in readings.items():
        pairs = list(zip(readings["float32"], found, strict=True))[:count]
        same = sum(one.label == other.label for one, other in pairs)
        kept = sum(one.kept == other.kept for one, other in pairs)
        right = sum(
            reading.label == label
            for reading, label in zip(found[count:], labels[count:], strict=True)
        )
        agreed = [percent(same, count), percent(kept, count)] if name != "float32" else ["", ""]
        cells[name] = [*agreed, percent(right, options.attacked)]
    return cells


def main(arguments: Sequence[str] | None = None) -> int:
    parser = make_parser("benchmarks.low_precision", __doc__)
    add = parser.add_argument
    add("--size", choices=("embedded", "vit-b-32"), default="embedded")
    add("--data", type=Path, help="parquet or folders with labels, for the embedded model")
    add("--images", type=int, default=500, help="images to compare labels on")
    add("--attacked", type=int, default=200, help="of these, how many to attack as well")
    add("--views", type=int, default=16, help="views of each image")
    add("--variants", nargs="+", choices=tuple(VARIANTS), default=tuple(VARIANTS))
    add("--rounds", type=int, default=30, help="timings of each variant")
    add("--section", help="of docs/performance.md, to be written from this run")
    options = parser.parse_args(arguments)
    if options.data and options.size != "embedded":
        parser.error("random weights have no labels to compare: give --data with embedded only")
    if not 0 < options.attacked <= options.images:
        parser.error("--attacked is from 1 to --images")
    prepare_torch()
    classifier = build_classifier(options.size, "cpu", "fp32")
    names = open_dataset(options.data).names if options.data else ["a cat", "a dog"]
    subject = Subject(classifier, names, options.variants)
    checkpoint = classifier.checkpoint
    image = draw_image(0, checkpoint.preprocessing.crop)
    views = make_views(image, options.views, 0, checkpoint.preprocessing, CPU)
    seconds = time_variants(subject, views, options.rounds)
    heads = ["variant", "seconds", "float32's seconds / its own"]
    cells = dict.fromkeys(seconds, [""] * 0)
    if options.data:
        heads += ["same label", "same confident views", "right under the transfer attack"]
        cells = compare(subject, options)
    rows = []
    for name, runs in seconds.items():
        ratio = median(a / b for a, b in zip(seconds["float32"], runs, strict=True))
        rows.append((f"`{name}`", f"{median(runs):.3f}", f"{ratio:.2f}", *cells[name]))
    caption = (
        f"{options.size}, {options.views} views with the learned prompts, medians of "
        f"{options.rounds} turns. "
    )
    if options.data:
        caption += (
            f"Labels: all {len(names)} names of `{options.data.name}`, {options.images} images; "
            f"{options.attacked} of them under PGD at 2/255 on undefended float32 CLIP "
            f"({BUDGET.steps} steps). Intervals: 95%. "
        )
    made = f"Written by `{command_line('benchmarks.low_precision', arguments)}`."
    text = f"{tabulate(tuple(heads), rows)}\n\n{caption}{machine()} {made}"
    print(text)
    if options.section:
        write_section(options.section, text, DOCS / "performance.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
