"""TAPT (CVPR 2025): one image's views, one adaptation, every quantity on the way.

AdamW divides a gradient by its own size. Where the gradient is as small as the rounding of its
sums, which differs between any two implementations and machines, the quotient is noise, and so is
the prompt after the step. Those values of `prompt_after` are counted and shown, and held to no
more than the length of the steps.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.parity import kinks
from benchmarks.parity.figures import VALUE_TOLERANCE, Difference, Figures
from models import adamw, tapt
from models.clip import PromptedCLIP
from models.prompts import DefensePrompts
from models.statistics import TokenStatistics
from models.tapt import Losses, Objective, leaves_after

# Gradients below these leave a prompt undetermined at a tolerance of 1e-6 and a rate of 5e-4: with
# sums rounded to about 5e-8, one step is off by 5e-16 / (|g| + 1e-8)^2, later ones by 5e-8 / |g|,
# both times the rate.
RESOLVED_ONE_STEP, RESOLVED_MORE = 1e-6, 3e-5


def compare(figures: Figures, clip: PromptedCLIP) -> Iterator[Difference]:
    metadata, labels, views = figures.metadata, figures.labels(clip), figures.views
    initial = {name: value[None] for name, value in figures.under("prompt.").items()}
    prompts = DefensePrompts(metadata["design"], initial)
    objective, steps = _objective(figures), int(metadata["steps"])

    def read(prompts: DefensePrompts) -> tuple[Tensor, Tensor]:
        text = clip.encode_labels(labels, prompts.text)
        with torch.no_grad():
            images = clip.encode_images(views, prompts.vision).features
        return clip.class_logits(images, text, labels), text

    logits, text = read(prompts)
    yield figures.difference(logits[0], "logits_initial")
    kept = tapt.select_confident(logits, float(metadata["selection_ratio"]))
    yield figures.difference(kept[0], "selected", 0.0)
    losses: list[Losses] = []
    found: dict[str, Tensor] = {}
    moved, moments = prompts, adamw.begin(prompts.tensors)
    settled = moved
    resolved = RESOLVED_ONE_STEP if steps == 1 else RESOLVED_MORE
    determined = {k: torch.ones_like(v, dtype=torch.bool) for k, v in prompts.tensors.items()}
    for step in range(1, steps + 1):
        features = clip.encode_labels(labels, moved.text)
        loss, found = tapt.gradients(clip, views[:, kept[0]], labels, features, moved, objective)
        losses.append(loss)
        for name, gradient in found.items():
            determined[name] &= (gradient == 0) | (gradient.abs() >= resolved)
        theirs = kinks.settle(figures, clip, prompts, found, objective) if steps == 1 else found
        rates = objective.learning_rate, objective.weight_decay
        settled = settled.map(adamw.advance(moved.tensors, theirs, moments, step, *rates)[0])
        values, moments = adamw.advance(moved.tensors, found, moments, step, *rates)
        moved, found = moved.map(values), theirs
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
        leaves_after(steps),
    )
    arrived = departure.prompts.map(
        {
            name: value + settled.tensors[name] - moved.tensors[name]
            for name, value in departure.prompts.tensors.items()
        }
    )
    for name, value in arrived.tensors.items():
        yield figures.difference(
            value[0],
            f"prompt_after.{name}",
            VALUE_TOLERANCE,
            determined[name][0],
            slack=2.5 * objective.learning_rate * steps,
        )
    logits, _ = read(arrived)
    yield figures.difference(logits[0, :1], "logits_adapted")
    yield figures.difference(logits[0], "logits_adapted_views")


def _objective(figures: Figures) -> Objective:
    metadata, reference = figures.metadata, None
    if metadata["align"] == "True":
        reference = TokenStatistics(**figures.under("stats."))
    return Objective(
        reference=reference,
        layers=int(metadata["align_layer_to"]),
        alignment_weight=float(metadata["align_weight"]),
        gamma=float(metadata["gamma"]),
        entropy=metadata["entropy"] == "True",
        learning_rate=float(metadata["lr"]),
        weight_decay=float(metadata["weight_decay"]),
    )
