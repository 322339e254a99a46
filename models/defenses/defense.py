"""The one signature that every defense has, and what goes in and out."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from models.clip import PromptedCLIP
from models.label_encoder import Prompting
from models.labels import LabelBatch
from models.objective import Objective
from models.prompts import DefensePrompts

Leaving = Callable[[int, list[int]], set[int]]
"""Asked at each step boundary with the steps taken and the requests still in; returns those that
leave now."""


@dataclass(frozen=True, slots=True)
class LabelFeatures:
    """Label rows of the batch's requests and their features [R, D]."""

    batch: LabelBatch
    features: Tensor

    def select(self, rows: Sequence[int]) -> "LabelFeatures":
        """Those of some requests, in order."""
        return LabelFeatures(self.batch.select(rows), self.batch.take(self.features, rows))


@dataclass(frozen=True, slots=True)
class Images:
    """B requests to defend together, all with V views.

    Attributes:
        views: [B, V, 3, S, S] in [0, 1]; view 0 is the picture itself.
        plain: the labels as undefended CLIP reads them.
        prompted: the labels at the prompts that the defense starts from, slots included.
        prompts: those prompts, [B, ...]; no tokens for a defense that has none.
        readouts: a readout a request.
        seeds: a seed a request, for what a defense draws beside the views.
    """

    views: Tensor
    plain: LabelFeatures
    prompted: LabelFeatures
    prompts: DefensePrompts
    objective: Objective
    selection_ratio: float
    readouts: list[str]
    seeds: list[int]
    leaving: Leaving

    def select(self, rows: list[int]) -> "Images":
        """Some of the requests, numbered anew from 0."""

        def leaving(steps: int, places: list[int]) -> set[int]:
            gone = self.leaving(steps, [rows[place] for place in places])
            return {place for place in places if rows[place] in gone}

        return Images(
            views=self.views[rows],
            plain=self.plain.select(rows),
            prompted=self.prompted.select(rows),
            prompts=self.prompts.select(rows),
            objective=self.objective,
            selection_ratio=self.selection_ratio,
            readouts=[self.readouts[row] for row in rows],
            seeds=[self.seeds[row] for row in rows],
            leaving=leaving,
        )


@dataclass(frozen=True, slots=True)
class Verdict:
    """A defense's answer for one request.

    Attributes:
        row: the request, as an index into the batch.
        probabilities: [C], sums to 1.
        views: probabilities [V, C] of all views as first seen, before any adaptation.
        kept: how many views the loss looked at, or the prediction where there is no loss.
        entropy_before, entropy_after: of the kept views' mean prediction, nats.
        adapted: `time.perf_counter()` when adapting ended and reading out began.
    """

    row: int
    probabilities: Tensor
    views: Tensor
    kept: int
    steps: int
    entropy_before: float
    entropy_after: float
    adapted: float


Defense = Callable[[PromptedCLIP, Images], Iterator[Verdict]]


@dataclass(frozen=True, slots=True)
class Method:
    """A defense as the table lists it: the prompts that it starts from, and whether it takes
    steps."""

    defend: Defense
    prompting: Prompting
    adapts: bool

    @property
    def needs_bundle(self) -> bool:
        """Words that nobody learned and that stay as they are would be no defense."""
        return self.prompting == "learned" and not self.adapts
