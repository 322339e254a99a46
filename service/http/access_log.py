"""What is written down of every request: its id, one log line, the metrics.

An ASGI middleware, outside of everything but the server: an exception that reaches it is a fault
of ours, goes to the log, and leaves as a 500 without its text. Neither labels nor keys are logged.
"""

import json
import logging
import random
import re
import time
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.errors import ClientGone, InternalError, ServiceError
from service.telemetry.metrics import Metrics

logger = logging.getLogger("tapt.request")

CLASSIFICATIONS = {"/v1/classify", "/", "/demo/classify"}
REFUSALS = {
    "bad_request",
    "unauthorized",
    "upload_timeout",
    "too_large",
    "unsupported_image",
    "unprocessable",
    "image_too_costly",
}
"""Error types that mean that a request was refused before any work; the engine counts its own."""


class Journal:
    """Stamps, times, counts and logs each request that passes through to `app`."""

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

        async def stamp(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [
                    *message.get("headers", []),
                    (b"x-request-id", request_id.encode()),
                ]
            if status != ClientGone.status:  # nobody reads it
                await send(message)

        try:
            await self._app(scope, receive, stamp)
        except Exception:
            logger.exception("Unexpected failure, request_id=%s", request_id)
            notes["error"] = InternalError.error_type
            if not status:
                await _send_error(stamp, InternalError("Something went wrong here."), request_id)
        finally:
            self._write(scope, status or ClientGone.status, time.monotonic() - began, notes)

    def _write(self, scope: Scope, status: int, seconds: float, notes: dict[str, Any]) -> None:
        route = _route(scope)
        self._metrics.requests.labels(route, str(status)).inc()
        if route in CLASSIFICATIONS:
            self._metrics.request_seconds.observe(seconds)
            if notes.get("error") in REFUSALS:
                self._metrics.rejected.labels(notes["error"]).inc()
        level = logging.DEBUG if scope["path"] in _QUIET else logging.INFO
        fields = {
            "method": scope["method"],
            "route": route,
            "status": status,
            "ms": round(seconds * 1000, 1),
            "request_id": scope["state"]["request_id"],
            **notes,
        }
        logger.log(level, "%s %s %s", scope["method"], route, status, extra={"fields": fields})


_QUIET = {"/livez", "/readyz", "/startupz", "/health", "/metrics"}


def error_body(error: ServiceError, request_id: str) -> dict[str, str]:
    """The one shape of every error."""
    return {"error": error.message, "error_type": error.error_type, "request_id": request_id}


def _request_id(scope: Scope) -> str:
    """The client's `X-Request-Id` if it is printable ASCII of at most 128 characters."""
    for name, value in scope["headers"]:
        if name == b"x-request-id" and re.fullmatch(rb"[!-~]{1,128}", value):
            return str(value, "ascii")
    return f"{random.getrandbits(128):032x}"  # names a request and guards nothing


def _route(scope: Scope) -> str:
    """The path of the route that matched, never the client's; the page has a name of its own,
    because it shares its path with the Hugging Face route."""
    route = getattr(scope.get("route"), "path", "other")
    return "/playground" if route == "/" and scope["method"] != "POST" else str(route)


async def _send_error(send: Send, error: ServiceError, request_id: str) -> None:
    headers = [(b"content-type", b"application/json")]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    body = json.dumps(error_body(error, request_id)).encode()
    await send({"type": "http.response.body", "body": body})
