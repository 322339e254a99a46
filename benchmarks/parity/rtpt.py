"""R-TPT (CVPR 2025): one image's views, the step, the weights, the weighted logits.

The published weights hang on fp32 rounding: see `models.readout.reliability`. They are reproduced
with the neighbors that the published run happened to take; the defense that serves never counts a
view as its own neighbor, because rounding differs with a request's company.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.parity.figures import VALUE_TOLERANCE, Difference, Figures
from models import tapt
from models.clip import PromptedCLIP
from models.defenses import rtpt
from models.defenses.defense import Adaptation, DefenseInput, LabelFeatures
from models.prompts import DefensePrompts
from models.readout import (
    NEIGHBORS,
    TEMPERATURE,
    mean_logits,
    mean_prediction,
    reliability,
)
from models.tapt import leaves_after


def compare(figures: Figures, clip: PromptedCLIP) -> Iterator[Difference]:
    labels, views = figures.labels(clip), figures.views
    prompts = DefensePrompts("text", {"text": figures.given["prompt.context"][None, None]})
    ratio, steps = float(figures.metadata["selection_ratio"]), int(figures.metadata["steps"])
    with torch.no_grad():
        features = clip.encode_images(views).features

    def read(prompts: DefensePrompts) -> tuple[Tensor, Tensor]:
        text = clip.encode_labels(labels, prompts.text)
        return clip.class_logits(features, text, labels), text

    logits, text = read(prompts)
    yield figures.difference(logits[0], "logits_initial")
    kept = views[:, tapt.select_confident(logits, ratio)[0]]
    objective = rtpt.OBJECTIVE
    (departure,) = tapt.adapt(clip, kept, labels, text, prompts, objective, leaves_after(steps))
    after = departure.prompts.tensors["text"]
    yield figures.difference(after[0, 0], "context_after", VALUE_TOLERANCE)
    counted = _count_themselves(features[0], figures.expected["weights"])
    weights = reliability(features, torch.diag(~counted))
    yield figures.difference(weights[0], "weights")
    tuned, _ = read(departure.prompts)
    yield figures.difference(tuned[0], "logits_tuned_views")
    yield figures.difference(mean_logits(tuned, weights), "logits")
    # The defense that serves must arrive where its parts do, each view without itself.
    seen = LabelFeatures(labels, text)
    inputs = DefenseInput(
        views=views,
        plain=seen,
        prompted=seen,
        prompts=prompts,
        objective=objective,
        selection_ratio=ratio,
        readouts=["weighted"],
        seeds=[0],
        adaptation=Adaptation(leaves_after(steps)),
    )
    with torch.no_grad():
        (output,) = rtpt.defend(clip, inputs)
    found = mean_prediction(output.logits, output.weights, output.averages_logits)
    parts = mean_logits(tuned, reliability(features)).softmax(dim=-1)
    gap = found - parts
    yield Difference("verdict", float(gap.abs().max()), VALUE_TOLERANCE)


def _count_themselves(features: Tensor, weights: Tensor) -> Tensor:
    """Which views [V] were their own neighbors, read off the published weights [V]: for each view
    there are two possible values, and all share one factor."""
    cosines = features @ features.T
    among_all = cosines.topk(NEIGHBORS).values.mean(dim=-1)
    among_others = cosines.fill_diagonal_(-2).topk(NEIGHBORS).values.mean(dim=-1)
    above = TEMPERATURE * weights.log() - among_others
    return above - above.min() > (among_all - among_others) / 2
