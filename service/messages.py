"""What passes between the rooms: a request as the worker sees it, and what comes back.

Everything here is picklable and free of torch; instants are `time.monotonic()` seconds, which
the processes of one machine share.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Truncation = Literal["deadline", "cancelled"]


@dataclass(frozen=True, slots=True)
class DemoAttack:
    """An attack to be made on an image and watched, for the demonstration.

    `epsilon` is in levels of 255, `target` the index of the label to be named (None: away from
    what is named now), `adaptive` whether the attacker knows the defense.
    """

    epsilon: int
    steps: int
    target: int | None
    adaptive: bool


@dataclass(frozen=True, slots=True)
class Task:
    """One image to classify, with every choice already made and clamped.

    `image` is uint8 RGB, [height, width, 3]; `template` holds exactly one `{}`,
    None is the model's default; `seed` draws the
    views; `deadline` is the instant by which the answer must be out; `exhibit` asks for the views
    in the answer. With an `assault` the image is attacked first, and the answer is about what came
    of it.
    """

    id: str
    image: NDArray[np.uint8]
    labels: tuple[str, ...]
    template: str | None
    method: str
    steps: int
    views: int
    readout: str
    seed: int
    deadline: float
    return_views: bool = False
    tier: str = "standard"
    attack: DemoAttack | None = None


@dataclass(frozen=True, slots=True)
class ViewReport:
    """One view, uint8 RGB [S, S, 3], the index of its own best label and that one's score, as first
    seen; `kept` is whether the loss looked at it."""

    image: NDArray[np.uint8]
    best: int
    score: float
    kept: bool


@dataclass(frozen=True, slots=True)
class ProgressEvent:
    """A step of an assault: the image so far, uint8 RGB [S, S, 3], and the scores of undefended
    CLIP and of the defense (None where it was not asked)."""

    step: int
    image: NDArray[np.uint8]
    undefended_scores: list[float]
    defended_scores: list[float] | None


@dataclass(frozen=True, slots=True)
class Answer:
    """What the worker found. `scores` follow the order of the labels and sum to 1."""

    scores: list[float]
    undefended_scores: list[float]
    design: str
    steps: int
    views: int
    views_kept: int
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
    """A request that could not be answered: the `error_type` of an error in `errors.ERRORS`."""

    error_type: str
    message: str


# API process to worker.


@dataclass(frozen=True, slots=True)
class Run:
    """Run these together, once what came before is finished; at most one batch waits."""

    batch: list[Task]


@dataclass(frozen=True, slots=True)
class Cancel:
    """Nobody waits for these any more; the worker drops them at its next step boundary."""

    ids: frozenset[str]


# Worker to API process.


@dataclass(frozen=True, slots=True)
class Ready:
    """The model is loaded and warm. `info` is what `/info` shows of it (JSON types only)."""

    info: dict[str, Any]
    max_batch_tokens: int
    image_tokens: int
    context_length: int


@dataclass(frozen=True, slots=True)
class Beat:
    """Sign of life, about once a second: seconds since the last progress of a running batch
    (0 when idle) and the device memory in use."""

    stalled_seconds: float
    memory_bytes: int


@dataclass(frozen=True, slots=True)
class Settled:
    id: str
    result: Answer | Failure


@dataclass(frozen=True, slots=True)
class Progress:
    """News of an assault; its Settled is still to come."""

    id: str
    event: ProgressEvent


@dataclass(frozen=True, slots=True)
class Finished:
    """The batch is over and each of its requests was settled. `counts` are counters to add."""

    counts: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Fatal:
    """The model cannot be served, however often one tries: one sentence for the operator."""

    message: str
