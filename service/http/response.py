"""The bodies of responses, and how much of an answer each caller may see.

An attacker who can query often climbs along the scores, and fewer digits slow that down. The order
of the labels and the defense's diagnostics reveal the same information, so `expose` limits them
too. The diagnostics are a second oracle, and the undefended label one on a weaker model: where the
server has keys, only those with the scope `diagnostics` see them.
"""

import math
from typing import Any, Literal
from urllib.parse import quote

from pydantic import BaseModel, ConfigDict, Field

from service.messages import Answer, Task

Expose = Literal["full", "rounded", "label"]


def _reported(header: str, description: str) -> Any:
    """A field that the Hugging Face route returns as a header, because its body has no room."""
    return Field(description=description, json_schema_extra={"x-header": header})


class _Response(BaseModel):
    model_config = ConfigDict(use_attribute_docstrings=True)


class ScoredLabel(BaseModel):
    label: str
    score: float = Field(ge=0, le=1)


class DefenseReport(BaseModel):
    """What the defense did and measured. The measurements, from `entropy_before` on, are null if
    the server exposes labels only, or if the key lacks the scope `diagnostics`."""

    tier: str = _reported("x-defense-tier", "The tier used: `fast`, `standard` or `deep`.")
    method: str = _reported("x-defense-method", "The defense used.")
    design: str = _reported(
        "x-defense-design",
        "Its prompts: `v`, `vli`, `vlj`; `text` for the template's own words; `none`.",
    )
    steps: int = _reported("x-defense-steps", "Adaptation steps taken.")
    views: int = _reported("x-defense-views", "Views of the image.")
    views_kept: int = _reported("x-defense-views-kept", "Views that the loss was computed on.")
    readout: str = _reported("x-defense-readout", "Views that the prediction was read from.")
    truncated: str | None = _reported(
        "x-defense-truncated", "`deadline` if it ended adapting early."
    )
    labels_truncated: int = _reported("x-labels-truncated", "Labels cut to the model's context.")
    entropy_before: float | None = _reported(
        "x-entropy-before", "Entropy of the kept views' mean before adapting, nats."
    )
    entropy_after: float | None = _reported("x-entropy-after", "The same after adapting, nats.")
    agreement: float | None = _reported("x-agreement", "Share of the views that agree.")
    suspicion: float | None = _reported("x-suspicion", "Attack score; higher is more suspicious.")
    suspected: bool | None = _reported(
        "x-suspected", "Whether suspicion exceeds the bundle's threshold; null without one."
    )
    undefended_label: str | None = _reported(
        "x-undefended-label", "The answer of undefended CLIP; percent-encoded UTF-8 in the header."
    )


class Timings(BaseModel):
    """Milliseconds."""

    queue: float = _reported("x-queue-time", "Milliseconds in the queue.")
    decode: float
    adapt: float
    predict: float
    total: float = _reported("x-total-time", "Milliseconds from the first byte to the answer.")

    @property
    def inference(self) -> float:
        return round(self.adapt + self.predict, 3)


INFERENCE_HEADER = "x-inference-time"
"""The one header that is no field: adapting and predicting together."""


class Classification(_Response):
    """The answer of `POST /v1/classify`."""

    id: str
    model: str
    labels: list[ScoredLabel]
    """Best first."""
    defense: DefenseReport
    timings_ms: Timings


class View(_Response):
    """A view as the defense first saw it."""

    label: str
    score: float
    kept: bool
    """Whether the loss was computed on it."""
    thumbnail: str
    """A PNG as a `data:` URI."""


class DemoClassification(Classification):
    """The answer of `POST /demo/classify`."""

    views: list[View]


class AttackStage(_Response):
    """The image after some steps of an attack, and its classification."""

    step: int
    steps: int
    image: str
    """A lossless PNG of the model's input size as a `data:` URI."""
    undefended: list[ScoredLabel]
    defended: list[ScoredLabel] | None
    """Null if the defense was not run."""


class Status(BaseModel):
    """The answer of a health route when all is well."""

    status: Literal["ok"] = "ok"


class ErrorBody(_Response):
    """Every error."""

    error: str
    """One sentence."""
    error_type: str
    request_id: str


def build_response(
    task: Task,
    answer: Answer,
    *,
    model: str,
    queue_seconds: float,
    decode_seconds: float,
    total_seconds: float,
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

    def milliseconds(seconds: float) -> float:
        return round(seconds * 1000, 3)

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
            readout=answer.readout,
            truncated=answer.truncated,
            labels_truncated=answer.labels_truncated,
            entropy_before=measurement(answer.entropy_before),
            entropy_after=measurement(answer.entropy_after),
            agreement=measurement(answer.agreement),
            suspicion=measurement(answer.suspicion),
            suspected=answer.suspected if visible else None,
            undefended_label=undefended if visible else None,
        ),
        timings_ms=Timings(
            queue=milliseconds(queue_seconds),
            decode=milliseconds(decode_seconds),
            adapt=milliseconds(answer.adapt_seconds),
            predict=milliseconds(answer.predict_seconds),
            total=milliseconds(total_seconds),
        ),
    )


def report_headers(shown: Classification) -> dict[str, str]:
    """The report as headers. A field without a value has none."""
    values: dict[str, Any] = {
        header: getattr(part, name)
        for part in (shown.defense, shown.timings_ms)
        for name, header in header_names(type(part)).items()
    }
    values[INFERENCE_HEADER] = shown.timings_ms.inference
    return {name: _to_text(value) for name, value in values.items() if value is not None}


def header_names(model: type[BaseModel]) -> dict[str, str]:
    """The fields of a model that are returned as headers, and the headers."""
    extras = {name: field.json_schema_extra for name, field in model.model_fields.items()}
    return {
        name: str(extra["x-header"])
        for name, extra in extras.items()
        if isinstance(extra, dict) and "x-header" in extra
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
