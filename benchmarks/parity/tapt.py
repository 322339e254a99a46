"""TAPT (CVPR 2025): one image's views, one adaptation, every quantity on the way."""

from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.parity.figures import VALUE_TOLERANCE, Difference, Figures
from models import adamw, tapt
from models.clip import PromptedCLIP
from models.prompts import DefensePrompts
from models.statistics import TokenStatistics


def compare(figures: Figures, clip: PromptedCLIP) -> Iterator[Difference]:
    metadata, labels, views = figures.metadata, figures.labels(clip), figures.views
    initial = {name: value[None] for name, value in figures.under("prompt.").items()}
    prompts = DefensePrompts(metadata["design"], initial)
    objective, steps = _objective(figures), int(metadata["steps"])

    def read(prompts: DefensePrompts) -> tuple[Tensor, Tensor]:
        text = clip.encode_labels(labels, prompts.text)
        with torch.no_grad():
            images = clip.encode_images(views, prompts.vision).features
        return tapt.class_logits(clip, images, text, labels), text

    logits, text = read(prompts)
    yield figures.difference(logits[0], "logits_initial")
    kept = tapt.select_confident(logits, float(metadata["selection_ratio"]))
    yield figures.difference(kept[0], "selected", 0.0)
    losses: list[tapt.Losses] = []
    found: dict[str, Tensor] = {}
    moved, moments = prompts, adamw.begin(prompts.tensors)
    for step in range(1, steps + 1):
        features = clip.encode_labels(labels, moved.text)
        loss, found = tapt.gradients(clip, views[:, kept[0]], labels, features, moved, objective)
        losses.append(loss)
        values, moments = adamw.advance(
            moved.tensors, found, moments, step, objective.learning_rate, objective.weight_decay
        )
        moved = moved.map(values)
    for name in ("entropy", "align_adv", "align_clean"):
        if name in figures.expected:
            yield figures.difference(torch.cat([getattr(loss, name) for loss in losses]), name)
    for name in prompts.tensors:
        gradient = found.get(name, torch.zeros_like(prompts.tensors[name]))
        yield figures.difference(gradient[0], f"grad_last_step.{name}")
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
        yield figures.difference(value[0], f"prompt_after.{name}", VALUE_TOLERANCE)
    logits, _ = read(departure.prompts)
    yield figures.difference(logits[0, :1], "logits_adapted")
    yield figures.difference(logits[0], "logits_adapted_views")


def _objective(figures: Figures) -> tapt.Objective:
    metadata, reference = figures.metadata, None
    if metadata["align"] == "True":
        reference = TokenStatistics(**figures.under("stats."))
    return tapt.Objective(
        reference=reference,
        layers=int(metadata["align_layer_to"]),
        alignment_weight=float(metadata["align_weight"]),
        gamma=float(metadata["gamma"]),
        entropy=metadata["entropy"] == "True",
        learning_rate=float(metadata["lr"]),
        weight_decay=float(metadata["weight_decay"]),
    )
