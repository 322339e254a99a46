"""Test-time adversarial prompt tuning (TAPT, CVPR 2025, arXiv 2411.13136).

For one image: keep the most confident of its random views, then move this request's copy of the
defensive prompts a few AdamW steps down the entropy of the kept views' mean prediction plus the
distance of their token statistics from reference ones. Requests are a batch dimension, losses are
summed over them and the optimizer is elementwise: a result does not depend on its company.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from models import adamw
from models.clip import PromptedCLIP
from models.labels import LabelBatch
from models.objective import EarlyStopping, Losses, Objective, prompt_gradients
from models.prompts import DefensePrompts


@dataclass(frozen=True, slots=True)
class Departure:
    """Requests that leave the loop together: indices, adapted prompts [n, ...], steps taken."""

    rows: list[int]
    prompts: DefensePrompts
    steps: int


def select_confident(logits: Tensor, ratio: float) -> Tensor:
    """Indices [B, k] of the k = max(1, floor(V * ratio)) views of lowest entropy, lowest first."""
    order = entropies(logits).argsort(dim=-1, stable=True)
    return order[:, : max(1, int(logits.shape[1] * ratio))]


def entropies(logits: Tensor) -> Tensor:
    """Entropy [...] in nats of each prediction, from logits [..., C]."""
    log_p = logits.log_softmax(dim=-1)
    return -(log_p.exp() * log_p).sum(dim=-1)


def view_entropy(logits: Tensor) -> Tensor:
    """Entropy [B] in nats of the mean prediction over views, from logits [B, k, C]."""
    log_mean = logits.log_softmax(dim=-1).logsumexp(dim=1) - math.log(logits.shape[1])
    return -(log_mean.exp() * log_mean).sum(dim=-1)


Moments = tuple[Tensor, Tensor]
"""Mean and variance over views, [B, tokens, width] each."""


def token_moments(inputs: Sequence[Tensor]) -> list[Moments]:
    """Per layer, the moments of the kept views' block inputs [B, k, tokens, width]."""
    # Not torch.var_mean: a prompt token is equal in all views and in the reference, so its L1
    # gradient hangs on how the mean rounds.
    whole = (hidden.float() for hidden in inputs)
    return [(hidden.mean(dim=1), hidden.var(dim=1, correction=0)) for hidden in whole]


def alignment_loss(moments: Sequence[Moments], mean: Tensor, variance: Tensor) -> Tensor:
    """Distance [B] of the views' token moments from reference ones, summed over layers.

    Args:
        moments: as `token_moments` gives them.
        mean, variance: reference moments [layers, tokens, width].
    """
    total = torch.zeros(len(moments[0][0]), device=mean.device)
    for layer, (means, variances) in enumerate(moments):
        for moment, target in ((means, mean[layer]), (variances, variance[layer])):
            total = total + 0.5 * (moment - target).abs().mean(dim=(1, 2))
    return total


def losses(
    clip: PromptedCLIP,
    views: Tensor,
    labels: LabelBatch,
    text: Tensor,
    prompts: DefensePrompts,
    objective: Objective,
) -> tuple[Losses, Tensor]:
    """One step's loss terms, and what the step minimizes, [B], with its graph.

    Args:
        views: the kept views [B, k, 3, S, S] in [0, 1].
        text: the labels' features [R, D] at `prompts`.
    """
    reference = objective.reference
    images = clip.encode_images(views, prompts.vision, max(0, objective.layers - 1))
    entropy = align_adv = align_clean = torch.zeros(len(views), device=views.device)
    if objective.entropy:
        logits = clip.class_logits(images.features, text, labels)
        entropy = view_entropy(logits) if objective.of_mean else entropies(logits).mean(dim=1)
    if reference is not None and images.inputs:
        moments = token_moments(images.inputs)
        align_adv = alignment_loss(moments, reference.adv_mean, reference.adv_var)
        align_clean = alignment_loss(moments, reference.clean_mean, reference.clean_var)
    align = objective.gamma * align_adv + (1 - objective.gamma) * align_clean
    terms = Losses(entropy.detach(), align_adv.detach(), align_clean.detach())
    return terms, entropy + objective.alignment_weight / max(1, objective.layers) * align


def gradients(
    clip: PromptedCLIP,
    views: Tensor,
    labels: LabelBatch,
    text: Tensor,
    prompts: DefensePrompts,
    objective: Objective,
) -> tuple[Losses, dict[str, Tensor]]:
    """One step's losses and its gradients by prompt name, from the arguments of `losses`."""
    terms: list[Losses] = []

    def loss(leaves: DefensePrompts, features: Tensor) -> Tensor:
        term, each = losses(clip, views, labels, features, leaves, objective)
        terms.append(term)
        return each.sum()

    found = prompt_gradients(clip, labels, text, prompts, loss, objective.moving(prompts))
    return terms[0], found


def adapt(
    clip: PromptedCLIP,
    views: Tensor,
    labels: LabelBatch,
    text: Tensor,
    prompts: DefensePrompts,
    objective: Objective,
    leaving: Callable[[int, list[int]], set[int]],
) -> Iterator[Departure]:
    """Adapt the prompts of all requests together and yield requests as they leave.

    Args:
        views, labels, text, prompts: as in `gradients`; `prompts` are the learned ones.
        leaving: asked at each step boundary with the steps taken and the requests still in, as
            indices into the batch; returns those that leave now.
    """
    rows, steps, moments = list(range(len(views))), 0, adamw.begin(prompts.tensors)
    still = EarlyStopping(objective.settled)
    while rows:
        gone = leaving(steps, rows) | still.rows
        if out := [place for place, row in enumerate(rows) if row in gone]:
            yield Departure([rows[place] for place in out], prompts.select(out), steps)
            stay = [place for place, row in enumerate(rows) if row not in gone]
            rows, views, prompts = [rows[i] for i in stay], views[stay], prompts.select(stay)
            text, labels = labels.take(text, stay), labels.select(stay)
            moments = {k: (first[stay], second[stay]) for k, (first, second) in moments.items()}
        if rows:
            if steps and "text" in objective.moving(prompts):
                text = clip.encode_labels(labels, prompts.text)
            terms, found = gradients(clip, views, labels, text, prompts, objective)
            still.watch(rows, terms)
            steps += 1
            rate, decay = objective.learning_rate, objective.weight_decay
            moved, moments = adamw.advance(prompts.tensors, found, moments, steps, rate, decay)
            prompts = prompts.map(moved)
