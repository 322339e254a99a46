"""The messages between the API process and its workers.

Everything here can be pickled and needs no torch. Instants are seconds of `time.monotonic()`, which
the processes of one machine share.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from models.images.preprocess import Preprocessing

Truncation = Literal["deadline", "cancelled"]


@dataclass(frozen=True, slots=True)
class DemoAttack:
    """An attack on an image, for the demonstration.

    `epsilon` is in levels of 255, `target` the index of the label to reach (None to leave the
    current one), `adaptive` whether to attack through the defense.
    """

    epsilon: int
    steps: int
    target: int | None
    adaptive: bool


@dataclass(frozen=True, slots=True)
class Task:
    """One image to classify, with all options resolved.

    `image` and `view` are the pixels and the view of a `DecodedImage`. `template` holds exactly one
    `{}`; of several, the mean of a label's features counts; None is the model's default. `seed`
    draws the views. The answer must be sent by the instant `deadline`; `own_deadline` tells whether
    the client chose it, shorter than the server's. `return_views` adds the views to the answer.
    With an `attack` the image is attacked first, and the answer is for the result.
    """

    id: str
    image: NDArray[np.uint8]
    labels: tuple[str, ...]
    template: str | tuple[str, ...] | None
    method: str
    steps: int
    views: int
    readout: str
    seed: int
    deadline: float
    own_deadline: bool = False
    return_views: bool = False
    tier: str = "standard"
    attack: DemoAttack | None = None
    view: NDArray[np.uint8] | None = None


@dataclass(frozen=True, slots=True)
class ViewReport:
    """One view, uint8 RGB [S, S, 3], with the index and score of its best label before adapting;
    `kept` tells whether the loss was computed on it."""

    image: NDArray[np.uint8]
    best: int
    score: float
    kept: bool


@dataclass(frozen=True, slots=True)
class ProgressEvent:
    """A step of an attack: the image so far, uint8 RGB [S, S, 3], and the scores of undefended CLIP
    and of the defense (None if it was not run)."""

    step: int
    image: NDArray[np.uint8]
    undefended_scores: list[float]
    defended_scores: list[float] | None


@dataclass(frozen=True, slots=True)
class Answer:
    """A worker's answer. Both lists of scores follow the order of the labels and sum to 1."""

    scores: list[float]
    undefended_scores: list[float]
    design: str
    steps: int
    views: int
    views_kept: int
    readout: str
    entropy_before: float
    entropy_after: float
    agreement: float
    suspicion: float
    suspected: bool | None
    truncated: Truncation | None
    labels_truncated: int
    adapt_seconds: float
    predict_seconds: float
    view_reports: tuple[ViewReport, ...] = ()


@dataclass(frozen=True, slots=True)
class Failure:
    """A request that could not be answered: what `errors.make_error` takes."""

    error_type: str
    message: str


# API process to worker.


@dataclass(frozen=True, slots=True)
class Run:
    """Run this batch after the one before it; at most one batch waits."""

    batch: list[Task]


@dataclass(frozen=True, slots=True)
class Cancel:
    """Drop these tasks; the worker stops as soon as nothing else needs what it computes."""

    ids: frozenset[str]


# Worker to API process.


@dataclass(frozen=True, slots=True)
class Ready:
    """The model is loaded and warmed up. `info` is its part of `/info` (JSON types only).

    `typical_seconds` is how long the warm-up took for one request with the server's defaults.
    `preprocessing` is the checkpoint's, for the decoders.
    """

    info: dict[str, Any]
    max_batch_tokens: int
    image_tokens: int
    context_length: int
    typical_seconds: float = 0.1
    preprocessing: Preprocessing | None = None


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """Sent about once a second: seconds since the running batch made progress (0 when idle), and
    the device memory in use."""

    stalled_seconds: float
    memory_bytes: int


@dataclass(frozen=True, slots=True)
class Settled:
    """The result of one task."""

    id: str
    result: Answer | Failure


@dataclass(frozen=True, slots=True)
class Progress:
    """Progress of an attack; its Settled follows."""

    id: str
    event: ProgressEvent


@dataclass(frozen=True, slots=True)
class Finished:
    """The batch is done and each of its tasks was settled. `counts` are added to counters."""

    counts: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Fatal:
    """The model cannot be loaded: one sentence for the operator. The worker ends."""

    message: str
