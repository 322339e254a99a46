"""The interface of a defense: what it is given, what it returns, and how it adapts.

A defense is a module of this package with a `SPEC` (see `catalog`) and a function `defend`. It
computes in whatever gradient mode its caller has set: serving calls it under `torch.no_grad()`, an
adaptive attack differentiates its output with respect to the views.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import import_module

from torch import Tensor

from models.clip import PromptedCLIP
from models.defenses.catalog import DefenseSpec, Readout
from models.labels import LabelBatch
from models.prompts import DefensePrompts
from models.tapt import Adapt, Exit, Leaving, Objective, adapt


@dataclass(frozen=True, slots=True)
class LabelFeatures:
    """Label rows of the batch's requests and their features [R, D]."""

    batch: LabelBatch
    features: Tensor

    def select(self, rows: Sequence[int]) -> "LabelFeatures":
        """Those of some requests, in order."""
        return LabelFeatures(self.batch.select(rows), self.batch.take(self.features, rows))


@dataclass(frozen=True, slots=True)
class Adaptation:
    """How a defense is to adapt.

    Attributes:
        leaving: asked at each step boundary; ends the loop of the requests that it returns.
        adapt: runs the steps on prompts; an adaptive attack replaces it by one that it can
            differentiate.
        all_logits: return the logits of all views, adapted or not, for the report on an answer.
            Without, only the views that count in the answer are looked at again.
    """

    leaving: Leaving
    adapt: Adapt = adapt
    all_logits: bool = True


@dataclass(frozen=True, slots=True)
class DefenseInput:
    """B requests to defend together, all with V views.

    Attributes:
        views: [B, V, 3, S, S] in [0, 1]; view 0 is the image itself.
        plain: the labels as undefended CLIP reads them.
        prompted: the labels at the prompts that the defense starts from, slots included.
        prompts: those prompts, [B, ...]; zero tokens for a defense that has none.
        objective: what a step minimizes.
        selection_ratio: share of the views kept for the loss, in (0, 1].
        readouts: one readout per request.
        seeds: one seed per request, for what a defense draws besides the views.
    """

    views: Tensor
    plain: LabelFeatures
    prompted: LabelFeatures
    prompts: DefensePrompts
    objective: Objective
    selection_ratio: float
    readouts: Sequence[str]
    seeds: Sequence[int]
    adaptation: Adaptation

    def select(self, rows: list[int]) -> "DefenseInput":
        """Some of the requests, renumbered from 0."""

        def leaving(steps: int, places: list[int]) -> Exit:
            leave = self.adaptation.leaving(steps, [rows[place] for place in places])
            return Exit(
                {place for place in places if rows[place] in leave.done},
                {place for place in places if rows[place] in leave.dropped},
            )

        return DefenseInput(
            views=self.views[rows],
            plain=self.plain.select(rows),
            prompted=self.prompted.select(rows),
            prompts=self.prompts.select(rows),
            objective=self.objective,
            selection_ratio=self.selection_ratio,
            readouts=[self.readouts[row] for row in rows],
            seeds=[self.seeds[row] for row in rows],
            adaptation=replace(self.adaptation, leaving=leaving),
        )


@dataclass(frozen=True, slots=True)
class DefenseOutput:
    """What a defense computed for n requests that finish together.

    Attributes:
        rows: the requests, as indices into the batch.
        initial: logits [n, V, C] of the views before any adaptation.
        logits: logits [n, V', C] that the answer is read from.
        weights: [n, V'], rows sum to 1; None weighs all views alike.
        kept: indices [n, k] of the views that the loss looked at; None: all.
        averages_logits: average the views' logits, not their predictions.
        steps: optimization steps taken.
        readout: the views that the answer was read from, where the defense ignores the request's
            readout; None: as asked.
        adapted: `time.perf_counter()` when adapting ended and reading out began.
    """

    rows: list[int]
    initial: Tensor
    logits: Tensor
    adapted: float
    weights: Tensor | None = None
    kept: Tensor | None = None
    averages_logits: bool = False
    steps: int = 0
    readout: Readout | None = None

    def renumber(self, rows: list[int]) -> "DefenseOutput":
        """The output for a selection of requests, `rows`, numbered as in the whole batch."""
        return replace(self, rows=[rows[row] for row in self.rows])


Defense = Callable[[PromptedCLIP, DefenseInput], Iterator[DefenseOutput]]


def load_defense(spec: DefenseSpec) -> Defense:
    """The function that implements a defense."""
    defend: Defense = import_module(spec.module).defend
    return defend


def average_views(
    clip: PromptedCLIP, views: Tensor, labels: LabelFeatures, visual: Tensor | None = None
) -> DefenseOutput:
    """The mean prediction over views [B, V, 3, S, S].

    Args:
        visual: visual prompts [B, depth, tokens, width], or None.
    """
    start = time.perf_counter()
    features = clip.encode_images(views, visual).features
    logits = clip.class_logits(features, labels.features, labels.batch)
    return DefenseOutput(list(range(len(views))), logits, logits, adapted=start)
