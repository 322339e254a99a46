"""How much of an answer leaves the house.

Whoever can ask often can climb along scores; fewer digits slow that down. The order of the labels
and the measures of the defense would tell what the scores no longer do, so they shrink alike. The
measures are a second oracle, the undefended label even one on a weaker model: where the server
has keys, only those with the scope `diagnostics` see them.
"""

import math
from typing import Literal

from service.intake.intake import Outcome
from service.schemas import Classification, DefenseReport, ScoredLabel, Timings

Expose = Literal["full", "rounded", "label"]


def build_response(outcome: Outcome, expose: Expose, diagnostics: bool) -> Classification:
    """The answer as its client may see it, with the defense's measures or without."""
    work, answer = outcome.work, outcome.answer
    first = _best(answer.scores)
    seen = diagnostics and expose != "label"

    def measure(value: float) -> float | None:
        if not seen or not math.isfinite(value):
            return None
        return round(value, 2) if expose == "rounded" else value

    def score(index: int) -> float:
        if expose == "label":
            return float(index == first)
        value = min(1.0, max(0.0, answer.scores[index]))
        return round(value, 2) if expose == "rounded" else value

    scored = [ScoredLabel(label=label, score=score(i)) for i, label in enumerate(work.labels)]
    # Best first; what looks equal stays in the order that the client gave.
    order = sorted(range(len(scored)), key=lambda i: (i != first, -scored[i].score))
    return Classification(
        id=work.id,
        model=outcome.model,
        labels=[scored[i] for i in order[: outcome.top_k]],
        defense=DefenseReport(
            tier=work.tier,
            method=work.method,
            design=answer.design,
            steps=answer.steps,
            views=answer.views,
            views_kept=answer.views_kept,
            readout=work.readout,
            truncated=answer.truncated,
            labels_truncated=answer.labels_truncated,
            entropy_before=measure(answer.entropy_before),
            entropy_after=measure(answer.entropy_after),
            agreement=measure(answer.agreement),
            suspicion=measure(answer.suspicion),
            suspected=answer.suspected if seen else None,
            undefended_label=work.labels[_best(answer.undefended_scores)] if seen else None,
        ),
        timings_ms=Timings(
            queue=_milliseconds(outcome.queue_seconds),
            decode=_milliseconds(outcome.decode_seconds),
            adapt=_milliseconds(answer.adapt_seconds),
            predict=_milliseconds(answer.predict_seconds),
            total=_milliseconds(outcome.total_seconds),
        ),
    )


def _best(scores: list[float]) -> int:
    return max(range(len(scores)), key=scores.__getitem__)


def _milliseconds(seconds: float) -> float:
    return round(seconds * 1000, 3)
