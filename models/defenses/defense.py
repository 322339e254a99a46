"""The one signature that every defense has, and what goes in and out."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor

from models.clip import PromptedCLIP
from models.labels import LabelBatch
from models.prompts import DefensePrompts
from models.tapt import Objective


@dataclass(frozen=True, slots=True)
class LabelFeatures:
    """Label rows of the batch's requests and their features [R, D]."""

    batch: LabelBatch
    features: Tensor


@dataclass(frozen=True, slots=True)
class Images:
    """B requests to defend together, all with V views.

    Attributes:
        views: [B, V, 3, S, S] in [0, 1]; view 0 is the picture itself.
        plain: the labels as undefended CLIP reads them.
        prompted: the labels at the learned prompts, slots included.
        prompts: the learned prompts, [B, ...].
        readouts: a readout a request.
        leaving: asked at each step boundary with the steps taken and the requests still in;
            returns those that leave now.
    """

    views: Tensor
    plain: LabelFeatures
    prompted: LabelFeatures
    prompts: DefensePrompts
    objective: Objective
    selection_ratio: float
    readouts: list[str]
    leaving: Callable[[int, list[int]], set[int]]


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
