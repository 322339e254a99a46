"""Test-time adversarial prompt tuning (TAPT, CVPR 2025, arXiv 2411.13136).

For one image: keep the most confident of its random views. Then take a few AdamW steps on this
request's copy of the defensive prompts, to lower the entropy of the kept views' mean prediction and
the distance of their token statistics from reference ones. Requests are a batch dimension, losses
are summed over them and the optimizer is elementwise: a result does not depend on the rest of the
batch.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from models import adamw
from models.backward import differentiate, make_leaves
from models.clip import PromptedCLIP
from models.labels import LabelBatch
from models.prompts import DefensePrompts
from models.statistics import TokenStatistics

Adapts = Literal["all", "vision", "text"]
ADAPTS: tuple[Adapts, ...] = get_args(Adapts)
VISION = frozenset({"vision", "projection.weight", "projection.bias"})
MOVING: Mapping[Adapts, frozenset[str]] = {
    "all": VISION | {"text"},
    "vision": VISION,
    "text": frozenset({"text"}),
}


@dataclass(frozen=True, slots=True)
class Exit:
    """Requests that leave the loop at a step boundary, as batch indices.

    Attributes:
        done: they are read out.
        dropped: nobody waits for them, so nothing more is computed for them.
    """

    done: AbstractSet[int]
    dropped: AbstractSet[int] = frozenset()


Leaving = Callable[[int, list[int]], Exit]
"""(steps taken, requests still in) -> the requests that leave now. Requests are batch indices."""


def leaves_after(steps: int | Sequence[int]) -> Leaving:
    """Let each request leave after a number of steps: one for all, or one each."""

    def leaving(taken: int, rows: list[int]) -> Exit:
        limits = [steps] * len(rows) if isinstance(steps, int) else [steps[row] for row in rows]
        return Exit({row for row, limit in zip(rows, limits, strict=True) if taken >= limit})

    return leaving


@dataclass(frozen=True, slots=True)
class Objective:
    """What a step minimizes and how it moves.

    The defaults are the paper's. Serving differs in one: `load_classifier` adapts `vision`, not
    `all`. If a single view is kept, as at the defaults (16 views, `selection_ratio` 0.1), its
    variance is 0: the variance part of the alignment is a constant, and `of_mean` has no effect.

    Attributes:
        reference: token statistics to align with; None for the entropy alone.
        layers: the L that the alignment's weight is divided by; its sum runs over L - 1 blocks.
        alignment_weight: weight of the alignment against the entropy.
        gamma: share of the adversarial statistics in the alignment, in [0, 1].
        entropy: whether the entropy is part of the loss.
        of_mean: take the entropy of the kept views' mean prediction; else the mean of their
            entropies, as R-TPT does.
        learning_rate, weight_decay: AdamW's.
        adapts: which prompts move. While the text's stay, so do the labels' features, and a step
            does not pass through the text tower.
        early_stop: stop adapting once a step changes the entropy by less than this (nats); 0
            disables. The change is known when the next step begins, so the first step is always
            taken, and with one step allowed nothing changes.
    """

    reference: TokenStatistics | None = None
    layers: int = 0
    alignment_weight: float = 100.0
    gamma: float = 0.5
    entropy: bool = True
    of_mean: bool = True
    learning_rate: float = 5e-4
    weight_decay: float = 0.01
    adapts: Adapts = "all"
    early_stop: float = 0.0

    def moving(self, prompts: DefensePrompts) -> frozenset[str]:
        """Names of the prompts that a step may change: all, if `adapts` names none of them. (A
        model without a bundle has the template's words alone.)"""
        return (MOVING[self.adapts] & prompts.tensors.keys()) or frozenset(prompts.tensors)

    def moves_images(self, prompts: DefensePrompts) -> bool:
        """Whether a step changes the views' features. The visual prompts of design VLJ follow from
        its text prompts."""
        return prompts.design == "vlj" or not VISION.isdisjoint(self.moving(prompts))


@dataclass(frozen=True, slots=True)
class Losses:
    """The terms of a step's loss, [B] each; an absent term is 0."""

    entropy: Tensor
    align_adv: Tensor
    align_clean: Tensor


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
    # Not torch.var_mean: a prompt token is equal in all views and in the reference, so the sign of
    # its L1 gradient depends on how the mean rounds.
    whole = (hidden.float() for hidden in inputs)
    return [(hidden.mean(dim=1), hidden.var(dim=1, correction=0)) for hidden in whole]


def alignment_loss(moments: Sequence[Moments], mean: Tensor, variance: Tensor) -> Tensor:
    """Distance [B] of the views' token moments from reference ones: half of the mean absolute
    difference over tokens and width, summed over both moments and all layers.

    Args:
        moments: as returned by `token_moments`.
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
    images: Tensor | None = None,
) -> tuple[Losses, Tensor]:
    """The terms of a step's loss, and the loss [B] with its graph.

    Args:
        views: the kept views [B, k, 3, S, S] in [0, 1].
        text: the labels' features [R, D] at `prompts`.
        images: the views' features [B, k, D] at `prompts`, where no step changes them. The
            alignment is a constant then and left out. None encodes the views.
    """
    reference, inputs = objective.reference, list[Tensor]()
    if images is None:
        encoded = clip.encode_images(views, prompts.vision, max(0, objective.layers - 1))
        images, inputs = encoded.features, encoded.inputs
    entropy = align_adv = align_clean = torch.zeros(len(views), device=views.device)
    if objective.entropy:
        logits = clip.class_logits(images, text, labels)
        entropy = view_entropy(logits) if objective.of_mean else entropies(logits).mean(dim=1)
    if reference is not None and inputs:
        moments = token_moments(inputs)
        align_adv = alignment_loss(moments, reference.adv_mean, reference.adv_var)
        align_clean = alignment_loss(moments, reference.clean_mean, reference.clean_var)
    align = objective.gamma * align_adv + (1 - objective.gamma) * align_clean
    terms = Losses(entropy.detach(), align_adv.detach(), align_clean.detach())
    return terms, entropy + objective.alignment_weight / max(1, objective.layers) * align


@torch.enable_grad()
def prompt_gradients(
    clip: PromptedCLIP,
    labels: LabelBatch,
    text: Tensor,
    prompts: DefensePrompts,
    loss: Callable[[DefensePrompts, Tensor], Tensor],
    moving: frozenset[str] = MOVING["all"],
) -> dict[str, Tensor]:
    """The gradient of a loss at the moving prompts, by name; prompts it does not reach are absent.

    Args:
        text: the labels' features [R, D] at `prompts`.
        loss: maps prompts and label features to a scalar.
    """
    leaves, features = make_leaves(prompts, text, moving)
    return differentiate(clip, labels, leaves, features, loss(leaves, features))


@torch.enable_grad()
def gradients(
    clip: PromptedCLIP,
    views: Tensor,
    labels: LabelBatch,
    text: Tensor,
    prompts: DefensePrompts,
    objective: Objective,
    images: Tensor | None = None,
) -> tuple[Losses, dict[str, Tensor]]:
    """One step's losses and its gradients by prompt name; arguments as in `losses`."""
    leaves, features = make_leaves(prompts, text, objective.moving(prompts))
    terms, loss = losses(clip, views, labels, features, leaves, objective, images)
    return terms, differentiate(clip, labels, leaves, features, loss.sum())


@dataclass(frozen=True, slots=True)
class _Requests:
    """The requests in the loop, as indices into the batch, and their values as in `adapt`."""

    rows: list[int]
    views: Tensor
    labels: LabelBatch
    text: Tensor
    prompts: DefensePrompts
    images: Tensor | None
    moments: adamw.Moments

    def depart(self, leaving: AbstractSet[int], steps: int) -> Iterator[Departure]:
        """Those that leave, together, if there are any."""
        if out := [place for place, row in enumerate(self.rows) if row in leaving]:
            yield Departure([self.rows[place] for place in out], self.prompts.select(out), steps)

    def without(self, gone: AbstractSet[int]) -> "_Requests":
        stay = [place for place, row in enumerate(self.rows) if row not in gone]
        if len(stay) == len(self.rows):
            return self
        return _Requests(
            rows=[self.rows[place] for place in stay],
            views=self.views[stay],
            labels=self.labels.select(stay),
            text=self.labels.take(self.text, stay),
            prompts=self.prompts.select(stay),
            images=None if self.images is None else self.images[stay],
            moments={k: (first[stay], second[stay]) for k, (first, second) in self.moments.items()},
        )


class EarlyStopping:
    """Finds the requests whose last step changed their entropy by less than `threshold` nats; none
    if the threshold is 0."""

    def __init__(self, threshold: float) -> None:
        self._threshold, self._entropy = threshold, dict[int, float]()

    def update(self, rows: list[int], entropy: Tensor) -> set[int]:
        """Take the entropies [n] of the requests `rows` after a step, or before the first one, and
        return those of them that stop."""
        if not self._threshold:
            return set()
        before, self._entropy = self._entropy, dict(zip(rows, entropy.tolist(), strict=True))
        change = {row: abs(now - before.get(row, math.inf)) for row, now in self._entropy.items()}
        return {row for row in rows if change[row] < self._threshold}


def adapt(
    clip: PromptedCLIP,
    views: Tensor,
    labels: LabelBatch,
    text: Tensor,
    prompts: DefensePrompts,
    objective: Objective,
    leaving: Leaving,
    images: Tensor | None = None,
) -> Iterator[Departure]:
    """Adapt the prompts of all requests together and yield requests as they leave.

    The result is a constant to autograd, whatever the views require.

    Args:
        views, labels, text, prompts: as in `losses`; `prompts` are those to start from.
        leaving: asked at each step boundary, before the first step too.
        images: the views' features [B, k, D] at `prompts`, if known. Where no step changes them,
            the views are not encoded again.
    """
    images = None if images is None or objective.moves_images(prompts) else images.detach()
    rows, moments = list(range(len(views))), adamw.begin(prompts.tensors)
    here = _Requests(rows, views.detach(), labels, text, prompts, images, moments)
    moves_text, stopping = "text" in objective.moving(prompts), EarlyStopping(objective.early_stop)
    steps, rate, decay = 0, objective.learning_rate, objective.weight_decay
    while here.rows:
        leave = leaving(steps, here.rows)
        yield from here.depart(leave.done - leave.dropped, steps)
        here = here.without(leave.done | leave.dropped)
        if not here.rows:
            return
        if steps and moves_text:
            here = replace(here, text=clip.encode_labels(here.labels, here.prompts.text))
        stopped, found = _prepare_step(clip, here, objective, stopping)
        yield from here.depart(stopped, steps)
        steps += 1
        moved, after = adamw.advance(here.prompts.tensors, found, here.moments, steps, rate, decay)
        here = replace(here, prompts=here.prompts.map(moved), moments=after).without(stopped)


@torch.enable_grad()
def _prepare_step(
    clip: PromptedCLIP, here: _Requests, objective: Objective, stopping: EarlyStopping
) -> tuple[set[int], dict[str, Tensor]]:
    """The requests that stop before the next step, and the step's gradients by prompt name. If all
    stop, the backward pass is skipped and there are no gradients."""
    leaves, features = make_leaves(here.prompts, here.text, objective.moving(here.prompts))
    terms, loss = losses(clip, here.views, here.labels, features, leaves, objective, here.images)
    stopped = stopping.update(here.rows, terms.entropy)
    if len(stopped) == len(here.rows):
        return stopped, {}
    return stopped, differentiate(clip, here.labels, leaves, features, loss.sum())


Adapt = Callable[
    [PromptedCLIP, Tensor, LabelBatch, Tensor, DefensePrompts, Objective, Leaving, Tensor | None],
    Iterator[Departure],
]
"""The signature of `adapt`."""
