"""OpenTelemetry traces: a span per request with the children decode, queue, adapt and predict.

FastAPI opens the request's span as a child of the caller's `traceparent`. It exports by OTLP over
HTTP if `OTEL_EXPORTER_OTLP_ENDPOINT` names an endpoint, which needs the extra `otel`. Without an
endpoint no SDK is loaded and nothing is recorded. No span holds a label, an image or a key.
"""

import time
from collections.abc import MutableMapping
from contextlib import AbstractContextManager
from typing import Any

from fastapi.telemetry import TelemetryConfig
from opentelemetry import trace
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from starlette.datastructures import Headers
from starlette.types import Scope

from service.messages import Answer, Task

PROBES = {"/livez", "/readyz", "/startupz", "/health", "/metrics"}


def is_probe(scope: MutableMapping[str, Any]) -> bool:
    """Whether a request only asks how the server is: too frequent to trace or to log."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", "")) in PROBES


TELEMETRY: TelemetryConfig = {
    "auto_configure": True,
    "exclude": is_probe,
    "operation_spans": False,  # FastAPI's internal steps
    "metrics": False,  # exported for Prometheus
    "logs": False,
}
"""FastAPI's configuration. Without the extra `otel` it warns that it cannot export, and serves."""

_tracer = trace.get_tracer("tapt-serve")
_propagator = TraceContextTextMapPropagator()


def find_trace_id(scope: Scope) -> str | None:
    """The trace of a request as 32 hex digits: of its span, or else of the caller's `traceparent`,
    so that logs join the caller's trace where this server exports none."""
    span = trace.get_current_span()
    if not span.get_span_context().is_valid:
        span = trace.get_current_span(_propagator.extract(Headers(scope=scope)))
    context = span.get_span_context()
    return f"{context.trace_id:032x}" if context.is_valid else None


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
    # Without a threshold in the bundle nothing is said about the answer.
    judged = {} if answer.suspected is None else {"suspected": answer.suspected}
    span(
        "predict",
        predicting,
        now,
        readout=answer.readout,
        agreement=answer.agreement,
        suspicion=answer.suspicion,
        **judged,
    )
