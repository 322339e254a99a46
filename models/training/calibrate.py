"""Make a defense bundle for a checkpoint: prompts, the statistics taken with them, a threshold.

python -m models.training.calibrate --data DIR --out BUNDLE [--model embedded] ...
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor

from models.bundle import DefenseBundle
from models.checkpoint import Checkpoint, ModelError, load_checkpoint
from models.data import DataError, Dataset, open_dataset
from models.guard import DEFAULT_TEMPLATE, Guard, Picture
from models.labels import tokenize
from models.statistics import TokenStatistics, token_moments
from models.tapt import Objective
from models.training.prompt_tuning import Tuning, attack, tune_prompts
from models.views import make_views

CHUNK = 64  # pictures at once outside of the tuning
CPU = torch.device("cpu")


def make_bundle(
    checkpoint: Checkpoint,
    data: Dataset,
    tuning: Tuning,
    images: int,
    false_positive_rate: float,
    views: int,
    progress: Progress,
    names: list[str] | None = None,
) -> DefenseBundle:
    """Learn prompts on a labelled data set and take statistics and threshold with them.

    Args:
        images: how many pictures the statistics and the threshold are taken from.
        names: class names to use instead of the data set's own.

    Raises:
        DataError: the data set has no labels.
    """
    clip, names = checkpoint.clip, names or data.names
    if not names:
        raise DataError("prompts are learned on labelled pictures; these have no labels")
    slots = 0 if tuning.design == "v" else tuning.tokens
    texts = [DEFAULT_TEMPLATE.replace("{}", name) for name in names]
    end = clip.model.config.text_config.eos_token_id
    labels = tokenize(checkpoint.tokenizer, end, texts, clip.context_length, slots).to(clip.device)

    task = progress.add_task("learning prompts", total=tuning.steps)
    prompts = tune_prompts(
        clip,
        labels,
        _batches(checkpoint, data, tuning),
        tuning,
        lambda step, loss: progress.update(
            task, completed=step + 1, description=f"learning prompts, loss {loss:.3f}"
        ),
    )
    text = clip.encode_labels(labels, prompts.text)
    held_out = tuning.seed + 1
    task = progress.add_task("taking statistics", total=2 * images)

    def pixels(attacked: bool) -> Iterator[Tensor]:
        for batch, targets in _chunks(checkpoint, data, images, held_out, CHUNK):
            yield (
                attack(clip, batch, targets, text, prompts, tuning.epsilon, tuning.attack_steps)
                if attacked
                else batch
            )
            progress.advance(task, len(batch))

    clean, adversarial = (
        token_moments(clip, pixels(attacked), prompts) for attacked in (False, True)
    )
    shape = prompts.vision if prompts.vision is not None else prompts.text
    assert shape is not None
    bundle = DefenseBundle(
        prompts=prompts,
        statistics=TokenStatistics(*clean, *adversarial),
        template=DEFAULT_TEMPLATE,
        layers=shape.shape[1],
        checkpoint_sha256=checkpoint.sha256,
        provenance={"tuning": asdict(tuning), "classes": len(names), "statistics_images": images},
    )
    task = progress.add_task("setting the threshold", total=images)
    doubts: list[float] = []
    guard = Guard(checkpoint, bundle, Objective())
    for example in data.examples(images, held_out):
        picture = Picture(example.pixels, tuple(names), None, "single", len(doubts))
        doubts += [f.doubt for f in guard.classify([picture], "tapt", views, _leave_at_once)]
        progress.advance(task)
    threshold = float(torch.tensor(doubts).quantile(1 - false_positive_rate))
    return DefenseBundle(
        prompts=prompts,
        statistics=bundle.statistics,
        template=bundle.template,
        layers=bundle.layers,
        checkpoint_sha256=bundle.checkpoint_sha256,
        suspicion=threshold,
        false_positive_rate=false_positive_rate,
        provenance={**bundle.provenance, "threshold_views": views},
    )


def _leave_at_once(_: int, rows: list[int]) -> set[int]:
    return set(rows)


def _chunks(
    checkpoint: Checkpoint, data: Dataset, limit: int | None, seed: int, size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """View 0 of pictures [size, 3, S, S] in [0, 1] and their targets [size]."""
    held: list[tuple[Tensor, int]] = []
    device = checkpoint.clip.device
    for example in data.examples(limit, seed):
        view = make_views(example.pixels, 1, 0, checkpoint.preprocessing, CPU)[0]
        held.append((view, example.label))
        if len(held) == size:
            yield _collate(held, device)
            held = []
    if held:
        yield _collate(held, device)


def _collate(held: list[tuple[Tensor, int]], device: torch.device) -> tuple[Tensor, Tensor]:
    pixels = torch.stack([view for view, _ in held])
    return pixels.to(device), torch.tensor([label for _, label in held], device=device)


def _batches(
    checkpoint: Checkpoint, data: Dataset, tuning: Tuning
) -> Iterator[tuple[Tensor, Tensor]]:
    """Shuffled batches for ever, mirrored at random."""
    source = torch.Generator().manual_seed(tuning.seed)
    epoch = 0
    while True:
        for pixels, targets in _chunks(checkpoint, data, None, tuning.seed + epoch, tuning.batch):
            flips = torch.rand(len(pixels), generator=source) < 0.5
            flips = flips.to(pixels.device).view(-1, 1, 1, 1)
            yield torch.where(flips, pixels.flip(-1), pixels), targets
        epoch += 1


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m models.training.calibrate", description=(__doc__ or "").splitlines()[0]
    )
    defaults = Tuning()
    parser.add_argument("--model", default="embedded", help="embedded, a directory, or a hub id")
    parser.add_argument("--data", type=Path, required=True, help="labelled folder or parquet")
    parser.add_argument("--out", type=Path, required=True, help="directory of the new bundle")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--images", type=int, default=1000, help="for statistics and threshold")
    parser.add_argument("--views", type=int, default=16, help="for the threshold")
    parser.add_argument("--false-positive-rate", type=float, default=0.05)
    for name, value in asdict(defaults).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    options: dict[str, Any] = vars(parser.parse_args(argv))
    try:
        checkpoint = load_checkpoint(options["model"], torch.device(options["device"]))
        data = open_dataset(options["data"])
        tuning = Tuning(**{name: options[name] for name in asdict(defaults)})
        with Progress() as progress:
            bundle = make_bundle(
                checkpoint,
                data,
                tuning,
                min(options["images"], len(data)),
                options["false_positive_rate"],
                options["views"],
                progress,
            )
    except (ModelError, DataError) as error:
        print(error, file=sys.stderr)
        return 1
    bundle.save(options["out"])
    print(f"wrote {options['out']}: prompts {bundle.prompts_sha256[:12]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
