"""Hold the method against figures of the published implementation.

    python -m benchmarks.parity --figures DIR

Every `tapt_*.safetensors` in DIR is run on the `clip_*` checkpoint directory beside it; per file
and quantity the largest absolute difference is printed. Ends with status 1 beyond a tolerance.
The files carry views, token ids, initial prompts, reference statistics, and what the published
code made of them: see `tests/figures/README.md`.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from safetensors import safe_open
from torch import Tensor
from transformers import CLIPModel

from models import tapt
from models.clip import PromptedCLIP
from models.labels import LabelBatch
from models.prompts import DefensePrompts
from models.statistics import TokenStatistics

CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]
CLIP_STD = [0.26862954, 0.26130258, 0.27577711]
TOLERANCE, PROMPT_TOLERANCE = 1e-4, 1e-6


def load_checkpoint(directory: Path) -> PromptedCLIP:
    model = CLIPModel.from_pretrained(directory, use_safetensors=True, dtype=torch.float32)
    return PromptedCLIP(model, CLIP_MEAN, CLIP_STD)


def read_figures(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    with safe_open(path, "pt") as file:
        return file.metadata() or {}, {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118


def compare(path: Path, clip: PromptedCLIP) -> Iterator[tuple[str, float, float]]:
    """Yield (quantity, largest absolute difference, tolerance) for one file of figures."""
    metadata, figures = read_figures(path)
    expected = {k.removeprefix("expected."): v for k, v in figures.items() if "expected." in k}
    prompts = DefensePrompts(
        metadata["design"],
        {k.removeprefix("prompt."): v[None] for k, v in figures.items() if k.startswith("prompt.")},
    )
    ids = figures["input_ids"]
    end = clip.model.config.text_config.eos_token_id
    ends = ids.argmax(-1) if end == 2 else (ids == end).int().argmax(-1)
    labels = LabelBatch(ids[:, : int(ends.max()) + 1], ends, (len(ids),), (0,))
    views = figures["views"][None].float() / 255
    objective = _objective(metadata, figures)
    steps = int(metadata["steps"])

    def read(prompts: DefensePrompts) -> tuple[Tensor, Tensor]:
        text = clip.encode_labels(labels, prompts.text)
        with torch.no_grad():
            images = clip.encode_images(views, prompts.vision).features
        return tapt.class_logits(clip, images, text, labels), text

    def difference(
        value: Tensor, name: str, tolerance: float = TOLERANCE
    ) -> tuple[str, float, float]:
        if value.shape != expected[name].shape:
            raise ValueError(f"{path.name}: {name} is {list(expected[name].shape)}")
        gap = (value.double() - expected[name].double()).abs().max()
        return name, float(gap) if gap.isfinite() else float("inf"), tolerance

    logits, text = read(prompts)
    yield difference(logits[0], "logits_initial")
    kept = tapt.select_confident(logits, float(metadata["selection_ratio"]))
    yield difference(kept[0], "selected", 0.0)
    losses, found = [], {}
    moved, moments = prompts, tapt.adamw.begin(prompts.tensors)
    for step in range(1, steps + 1):
        features = clip.encode_labels(labels, moved.text)
        loss, found = tapt.gradients(clip, views[:, kept[0]], labels, features, moved, objective)
        losses.append(loss)
        values, moments = tapt.adamw.advance(
            moved.tensors, found, moments, step, objective.learning_rate, objective.weight_decay
        )
        moved = moved.map(values)
    for name in ("entropy", "align_adv", "align_clean"):
        if name in expected:
            yield difference(torch.cat([getattr(loss, name) for loss in losses]), name)
    for name in prompts.tensors:
        gradient = found.get(name, torch.zeros_like(prompts.tensors[name]))
        yield difference(gradient[0], f"grad_last_step.{name}")
    # The loop that serves must arrive where the steps taken one by one did.
    (departure,) = tapt.adapt(
        clip,
        views[:, kept[0]],
        labels,
        text,
        prompts,
        objective,
        lambda taken, rows: set(rows) if taken == steps else set(),
    )
    for name, value in departure.prompts.tensors.items():
        yield difference(value[0], f"prompt_after.{name}", PROMPT_TOLERANCE)
    logits, _ = read(departure.prompts)
    yield difference(logits[0, :1], "logits_adapted")
    yield difference(logits[0], "logits_adapted_views")


def _objective(metadata: dict[str, str], figures: dict[str, Tensor]) -> tapt.Objective:
    reference = None
    if metadata["align"] == "True":
        reference = TokenStatistics(
            **{k.removeprefix("stats."): v for k, v in figures.items() if k.startswith("stats.")}
        )
    return tapt.Objective(
        reference=reference,
        layers=int(metadata["align_layer_to"]),
        alignment_weight=float(metadata["align_weight"]),
        gamma=float(metadata["gamma"]),
        entropy=metadata["entropy"] == "True",
        learning_rate=float(metadata["lr"]),
        weight_decay=float(metadata["weight_decay"]),
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.parity", description=__doc__)
    parser.add_argument("--figures", type=Path, required=True, help="directory with the figures")
    directory: Path = parser.parse_args(argv).figures
    files = sorted(directory.glob("tapt_*.safetensors"))
    checkpoints = sorted(path for path in directory.glob("clip_*") if path.is_dir())
    if not files or not checkpoints:
        print(f"{directory} holds no tapt_*.safetensors beside a clip_* directory", file=sys.stderr)
        return 2
    clips = {path.name.removeprefix("clip_"): load_checkpoint(path) for path in checkpoints}
    table = Table("file", "quantity", "largest difference", "tolerance", "")
    worst = 0
    for path in files:
        clip = _checkpoint_of(path, clips)
        for quantity, gap, tolerance in compare(path, clip):
            beyond = not gap <= tolerance
            worst |= beyond
            verdict = "[red]beyond[/red]" if beyond else "ok"
            table.add_row(path.stem, quantity, f"{gap:.2e}", f"{tolerance:.0e}", verdict)
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    return int(worst)


def _checkpoint_of(path: Path, clips: dict[str, PromptedCLIP]) -> PromptedCLIP:
    """The checkpoint that a file's name speaks of, or the only one."""
    named = [name for name in clips if f"_{name}_" in f"{path.stem}_"]
    return clips[max(named, key=len)] if named else next(iter(clips.values()))


if __name__ == "__main__":
    sys.exit(main())
