"""The bodies of responses, and how much of an answer each caller may see.

An attacker who can query often climbs along the scores, and fewer digits slow that down. The order
of the labels and the defense's diagnostics reveal the same information, so `expose` limits them
too. The diagnostics are a second oracle, and the undefended label one on a weaker model: where the
server has keys, only those with the scope `diagnostics` see them.
"""

import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal
from urllib.parse import quote

from pydantic import BaseModel, Field

from service.messages import Answer, Task

Expose = Literal["full", "rounded", "label"]


@dataclass(frozen=True, slots=True)
class Header:
    """Marks a field that the Hugging Face route returns as a header, for want of room in the
    body."""

    name: str


class ScoredLabel(BaseModel):
    label: str
    score: float = Field(ge=0, le=1)


class DefenseReport(BaseModel):
    """What the defense did and measured. The measurements, from `entropy_before` on, are null if
    the server exposes labels only, or if the key lacks the scope `diagnostics`."""

    tier: Annotated[str, Header("x-defense-tier")] = Field(
        description="The tier used: `fast`, `standard` or `deep`."
    )
    method: Annotated[str, Header("x-defense-method")] = Field(description="The defense used.")
    design: Annotated[str, Header("x-defense-design")] = Field(
        description="Its prompts: `v`, `vli`, `vlj`; `text` for the template's own words; `none`."
    )
    steps: Annotated[int, Header("x-defense-steps")] = Field(description="Adaptation steps taken.")
    views: Annotated[int, Header("x-defense-views")] = Field(description="Views of the image.")
    views_kept: Annotated[int, Header("x-defense-views-kept")] = Field(
        description="Most confident views, which the loss was computed on."
    )
    readout: Annotated[str, Header("x-defense-readout")] = Field(
        description="Views that the prediction was read from."
    )
    truncated: Annotated[str | None, Header("x-defense-truncated")] = Field(
        description="`deadline` if the deadline ended the adaptation early."
    )
    labels_truncated: Annotated[int, Header("x-labels-truncated")] = Field(
        description="Labels cut to the model's context length."
    )
    entropy_before: Annotated[float | None, Header("x-entropy-before")] = Field(
        description="Entropy of the kept views' mean before adapting, nats."
    )
    entropy_after: Annotated[float | None, Header("x-entropy-after")] = Field(
        description="The same after adapting, nats."
    )
    agreement: Annotated[float | None, Header("x-agreement")] = Field(
        description="Share of the views that agree with the answer."
    )
    suspicion: Annotated[float | None, Header("x-suspicion")] = Field(
        description="Attack score; higher is more suspicious."
    )
    suspected: Annotated[bool | None, Header("x-suspected")] = Field(
        description="Whether suspicion exceeds the bundle's threshold; null without one."
    )
    undefended_label: Annotated[str | None, Header("x-undefended-label")] = Field(
        description="The answer of undefended CLIP; percent-encoded UTF-8 in the header."
    )


class Timings(BaseModel):
    """Milliseconds."""

    queue: Annotated[float, Header("x-queue-time")] = Field(description="In the queue.")
    decode: float = Field(description="Decoding the image.")
    adapt: float = Field(description="Adapting the prompts.")
    predict: float = Field(description="Predicting.")
    total: Annotated[float, Header("x-total-time")] = Field(
        description="From the first byte to the answer."
    )

    @property
    def inference(self) -> float:
        return round(self.adapt + self.predict, 3)


INFERENCE = Header("x-inference-time")
"""The one header that is no field: adapting and predicting together."""


class Classification(BaseModel):
    """The answer of `POST /v1/classify`."""

    id: str
    model: str
    labels: list[ScoredLabel] = Field(description="Best first.")
    defense: DefenseReport
    timings_ms: Timings


class View(BaseModel):
    """A view as the defense first saw it."""

    label: str
    score: float
    kept: bool = Field(description="Whether the loss was computed on it.")
    thumbnail: str = Field(description="A PNG as a `data:` URI.")


class DemoClassification(Classification):
    """The answer of `POST /demo/classify`."""

    views: list[View]


class AttackStage(BaseModel):
    """The image after some steps of an attack, and its classification."""

    step: int
    steps: int
    image: str = Field(description="A lossless PNG of the model's input size as a `data:` URI.")
    undefended: list[ScoredLabel]
    defended: list[ScoredLabel] | None = Field(description="Null if the defense was not run.")


class Status(BaseModel):
    """The answer of a health route when all is well."""

    status: Literal["ok"] = "ok"


class ErrorBody(BaseModel):
    """Every error."""

    error: str = Field(description="One sentence.")
    error_type: str
    request_id: str


def measure_times(
    answer: Answer, *, queue_seconds: float, decode_seconds: float, total_seconds: float
) -> Timings:
    """The timings of an answer, in milliseconds."""
    seconds = {
        "queue": queue_seconds,
        "decode": decode_seconds,
        "adapt": answer.adapt_seconds,
        "predict": answer.predict_seconds,
        "total": total_seconds,
    }
    return Timings(**{name: round(value * 1000, 3) for name, value in seconds.items()})


def build_response(
    task: Task,
    answer: Answer,
    timings: Timings,
    *,
    model: str,
    top_k: int | None = None,
    expose: Expose = "full",
    diagnostics: bool = True,
) -> Classification:
    """The answer as its caller may see it.

    `expose` limits the scores: all digits, two digits, or 1 for the first label and 0 for the
    others. Without `diagnostics` the defense's measurements are null.
    """
    first = best(answer.scores)
    visible = diagnostics and expose != "label"

    def measurement(value: float) -> float | None:
        if not visible or not math.isfinite(value):
            return None
        return round(value, 2) if expose == "rounded" else value

    def score(index: int) -> float:
        if expose == "label":
            return float(index == first)
        value = clamp(answer.scores[index])
        return round(value, 2) if expose == "rounded" else value

    scored = [ScoredLabel(label=label, score=score(i)) for i, label in enumerate(task.labels)]
    # Best first. Equal scores keep the client's order, so that rounding hides the true one.
    order = sorted(range(len(scored)), key=lambda i: (i != first, -scored[i].score))
    undefended = task.labels[best(answer.undefended_scores)]
    return Classification(
        id=task.id,
        model=model,
        labels=[scored[i] for i in order[:top_k]],
        defense=DefenseReport(
            tier=task.tier,
            method=task.method,
            design=answer.design,
            steps=answer.steps,
            views=answer.views,
            views_kept=answer.views_kept,
            readout=task.readout,
            truncated=answer.truncated,
            labels_truncated=answer.labels_truncated,
            entropy_before=measurement(answer.entropy_before),
            entropy_after=measurement(answer.entropy_after),
            agreement=measurement(answer.agreement),
            suspicion=measurement(answer.suspicion),
            suspected=answer.suspected if visible else None,
            undefended_label=undefended if visible else None,
        ),
        timings_ms=timings,
    )


def report_headers(shown: Classification) -> dict[str, str]:
    """The report as headers. A field without a value has none."""
    values: dict[str, Any] = {
        header.name: getattr(part, name)
        for part in (shown.defense, shown.timings_ms)
        for name, header in marked_fields(type(part)).items()
    }
    values[INFERENCE.name] = shown.timings_ms.inference
    return {name: _to_text(value) for name, value in values.items() if value is not None}


def marked_fields(model: type[BaseModel]) -> dict[str, Header]:
    """The fields of a model that are returned as headers."""
    return {
        name: mark
        for name, field in model.model_fields.items()
        for mark in field.metadata
        if isinstance(mark, Header)
    }


def best(scores: list[float]) -> int:
    """The index of the highest score, the first of equals."""
    return max(range(len(scores)), key=scores.__getitem__)


def clamp(score: float) -> float:
    """A score without its rounding error, in [0, 1]."""
    return min(1.0, max(0.0, score))


def _to_text(value: str | bool | float) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return quote(value, safe="") if isinstance(value, str) else str(value)
