"""Traces by OpenTelemetry: one span a request, and in it decode, queue, adapt and predict.

FastAPI opens the request's span, as a child of the caller's `traceparent`, and exports by OTLP over
HTTP where the standard variables name an endpoint (`OTEL_EXPORTER_OTLP_ENDPOINT`); that needs the
extra `otel`. Without an endpoint no SDK is loaded and nothing is recorded. No span holds a label,
a picture or a key.
"""

import time

from fastapi.telemetry import TelemetryConfig
from opentelemetry import trace

from service.messages import Answer, Task

QUIET = {"/livez", "/readyz", "/startupz", "/health", "/metrics"}

TELEMETRY: TelemetryConfig = {
    "auto_configure": True,
    "exclude": lambda scope: scope["path"] in QUIET,
    "operation_spans": False,  # of FastAPI's own inner steps
    "metrics": False,  # Prometheus has them
    "logs": False,
}
"""What FastAPI is told; without the extra `otel` it warns that it cannot export, and serves."""

_tracer = trace.get_tracer("tapt-serve")


def record(
    work: Task, answer: Answer, decoding: float, decoded: float, queue_seconds: float
) -> None:
    """Write down the spans of a request that was answered just now.

    `decoding` and `decoded` are instants of `time.monotonic()`. What the pipes took lies between
    the queue and the adaptation.
    """
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

    height, width, _ = work.image.shape
    request.set_attribute("tapt.request_id", work.id)
    span("decode", decoding, decoded, height=height, width=width)
    span("queue", decoded, decoded + queue_seconds)
    span(
        "adapt",
        adapting,
        predicting,
        method=work.method,
        design=answer.design,
        labels=len(work.labels),
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
        readout=work.readout,
        agreement=answer.agreement,
        suspicion=answer.suspicion,
        suspected=bool(answer.suspected),
    )
