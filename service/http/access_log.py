"""The access log: an id, a log line and metrics for every request.

This is the outermost ASGI middleware. An exception that reaches it is a bug; it is logged and
answered by a 500 without its text. Labels and keys are never logged.
"""

import json
import logging
import random
import re
import time
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.errors import ClientGone, InternalError, ServiceError
from service.http.response import ErrorBody
from service.telemetry.metrics import Metrics
from service.telemetry.traces import find_trace_id, is_probe

logger = logging.getLogger("tapt.request")

CLASSIFICATIONS = {"/v1/classify", "/", "/demo/classify"}
REFUSALS = {
    "bad_request",
    "unauthorized",
    "upload_timeout",
    "too_large",
    "unsupported_image",
    "unsupported_encoding",
    "unprocessable",
    "image_too_costly",
}
"""Error types of requests that were refused before they ran; other parts count their own."""


class AccessLog:
    """Gives each request an id, and times, counts and logs it."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _request_id(scope)
        notes: dict[str, Any] = {}
        scope.setdefault("state", {}).update(request_id=request_id, log=notes)
        began = time.monotonic()
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [
                    *message.get("headers", []),
                    (b"x-request-id", request_id.encode()),
                ]
            if status != ClientGone.status:  # the client is gone
                await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception:
            logger.exception("unexpected error, request_id=%s", request_id)
            notes["error"] = InternalError.error_type
            if not status:
                await _send_error(send_with_id, InternalError("The server failed."), request_id)
        finally:
            self._write(scope, status or ClientGone.status, time.monotonic() - began, notes)

    def _write(self, scope: Scope, status: int, seconds: float, notes: dict[str, Any]) -> None:
        route = _route(scope)
        self._metrics.requests.labels(route, str(status)).inc()
        if route in CLASSIFICATIONS:
            if status == 200:  # refusals are quick
                # A client's slow upload is not ours, nor is the host of its image.
                arriving_ms = notes["upload_ms"] + notes.get("fetch_ms", 0.0)
                self._metrics.observe_request(notes["defense"], seconds - arriving_ms / 1000)
            elif notes.get("error") in REFUSALS:
                self._metrics.rejected.labels(notes["error"]).inc()
        level = logging.DEBUG if is_probe(scope) else logging.INFO
        if trace_id := find_trace_id(scope):
            notes["trace_id"] = trace_id
        fields = {
            "method": scope["method"],
            "route": route,
            "status": status,
            "ms": round(seconds * 1000, 1),
            "request_id": scope["state"]["request_id"],
            **notes,
        }
        logger.log(level, "%s %s %s", scope["method"], route, status, extra={"fields": fields})


def error_body(error: ServiceError, request_id: str) -> dict[str, str]:
    """The body of an error response."""
    body = ErrorBody(error=error.message, error_type=error.error_type, request_id=request_id)
    return body.model_dump()


def _request_id(scope: Scope) -> str:
    """The client's `X-Request-Id` if it is printable ASCII of at most 128 characters."""
    for name, value in scope["headers"]:
        if name == b"x-request-id" and re.fullmatch(rb"[!-~]{1,128}", value):
            return str(value, "ascii")
    return f"{random.getrandbits(128):032x}"  # not a secret


def _route(scope: Scope) -> str:
    """The path of the matched route, never the client's own. The page shares its path with the
    Hugging Face route, so it is called `/playground`."""
    route = getattr(scope.get("route"), "path", "other")
    return "/playground" if route == "/" and scope["method"] != "POST" else str(route)


async def _send_error(send: Send, error: ServiceError, request_id: str) -> None:
    headers = [(b"content-type", b"application/json")]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    body = json.dumps(error_body(error, request_id)).encode()
    await send({"type": "http.response.body", "body": body})
