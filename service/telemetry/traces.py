"""OpenTelemetry traces: a span per request with the children decode, queue, adapt and predict.

FastAPI opens the request's span as a child of the caller's `traceparent`. It exports by OTLP over
HTTP if `OTEL_EXPORTER_OTLP_ENDPOINT` names an endpoint, which needs the extra `otel`. Without an
endpoint no SDK is loaded and nothing is recorded. No span holds a label, an image or a key.
"""

import time
from contextlib import AbstractContextManager

from fastapi.telemetry import TelemetryConfig
from opentelemetry import trace

from service.messages import Answer, Task

QUIET = {"/livez", "/readyz", "/startupz", "/health", "/metrics"}

TELEMETRY: TelemetryConfig = {
    "auto_configure": True,
    "exclude": lambda scope: scope["path"] in QUIET,
    "operation_spans": False,  # FastAPI's internal steps
    "metrics": False,  # exported for Prometheus
    "logs": False,
}
"""FastAPI's configuration. Without the extra `otel` it warns that it cannot export, and serves."""

_tracer = trace.get_tracer("tapt-serve")


def trace_decoding() -> AbstractContextManager[trace.Span]:
    """A span around the decoding of an image."""
    return _tracer.start_as_current_span("decode")


def trace_answer(task: Task, answer: Answer, enqueued: float, queue_seconds: float) -> None:
    """Add the spans of a request that was just answered. `enqueued` is an instant of
    `time.monotonic()`. The gap between `queue` and `adapt` is the way to the worker and back."""
    request = trace.get_current_span()
    if not request.is_recording():
        return
    now, now_ns = time.monotonic(), time.time_ns()
    predicting = now - answer.predict_seconds
    adapting = predicting - answer.adapt_seconds

    def span(name: str, start: float, end: float, **attributes: str | int | float) -> None:
        start_ns, end_ns = (now_ns - int((now - instant) * 1e9) for instant in (start, end))
        named = {f"tapt.{key}": value for key, value in attributes.items()}
        _tracer.start_span(name, start_time=start_ns, attributes=named).end(end_ns)

    request.set_attribute("tapt.request_id", task.id)
    span("queue", enqueued, enqueued + queue_seconds)
    span(
        "adapt",
        adapting,
        predicting,
        method=task.method,
        design=answer.design,
        labels=len(task.labels),
        steps=answer.steps,
        views=answer.views,
        views_kept=answer.views_kept,
        entropy_before=answer.entropy_before,
        entropy_after=answer.entropy_after,
        truncated=answer.truncated or "no",
    )
    span(
        "predict",
        predicting,
        now,
        readout=task.readout,
        agreement=answer.agreement,
        suspicion=answer.suspicion,
        suspected=bool(answer.suspected),
    )
