"""The server process: uvicorn, from startup to a graceful shutdown."""

import asyncio
import contextlib
import logging
import socket
import sys
from types import FrameType

import uvicorn
from fastapi import FastAPI
from rich.console import Console
from rich.markup import escape

from service.app import create_app
from service.engine.engine import Engine
from service.http.connections import BACKLOG, limit_connections, raise_descriptor_limit
from service.http.root_path import mount
from service.http.same_site import is_loopback
from service.malloc import BODIES_BYTES, BODY_BYTES, keep_freed_memory, trim_regularly
from service.settings import Settings
from service.telemetry import logs
from service.worker.supervisor import Backend

TICK = 0.05  # seconds
log = logging.getLogger("tapt.server")

SHUTDOWN_TIMEOUT = 5  # seconds to send the last answers after the drain


class _Server(uvicorn.Server):
    """Uvicorn closes its socket at the first signal. This one keeps serving until the engine is
    drained, so that load balancers can see `/readyz` fail while admitted requests finish."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.stop_requested = False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.stop_requested:
            self.should_exit = self.force_exit = True
        self.stop_requested = True


def serve(settings: Settings, backend: Backend | None = None) -> int:
    """Serve until SIGTERM or SIGINT; the exit status, 1 if no worker can be started.

    Raises OSError if it cannot listen on the address. `backend` is for tests, as in `create_app`.
    """
    logs.configure(settings.log_format)
    raise_descriptor_limit()
    keep_freed_memory(BODY_BYTES, BODIES_BYTES)
    trim_regularly()
    with listen(settings.host, settings.port) as listener:
        app = create_app(settings, backend)
        warn_of_open_access(app, *listener.getsockname()[:2])
        return asyncio.run(_run(app, settings, listener))


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; `::` listens on IPv4 too. Raises OSError if the address cannot be
    used."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    both = host == "::" and socket.has_dualstack_ipv6()
    listener = socket.create_server((host, port), family=family, dualstack_ipv6=both)
    # Connections inherit this. asyncio sets it only on sockets with an explicit protocol number.
    # Without it a response's body waits until the client acknowledges its head, often for 40 ms.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def warn_of_open_access(app: FastAPI, host: str, port: int) -> None:
    """Log a warning if the server has no keys and other machines can reach it."""
    if not app.state.keys.needed and not is_loopback(host):
        log.warning(
            "No API keys are configured: every client that reaches %s may classify and see "
            "diagnostics.",
            _address(host, port),
        )


def configure(
    app: FastAPI, settings: Settings, shutdown_timeout: int = SHUTDOWN_TIMEOUT
) -> uvicorn.Config:
    """The HTTP server's configuration, used by the tests too."""
    return uvicorn.Config(
        mount(app, settings.root_path),
        http=limit_connections(settings.upload_timeout_ms / 1000),
        backlog=BACKLOG,
        log_config=None,
        access_log=False,
        server_header=False,
        ws="none",
        lifespan="on",
        timeout_keep_alive=settings.keep_alive_s,
        timeout_graceful_shutdown=shutdown_timeout,
    )


async def _run(app: FastAPI, settings: Settings, listener: socket.socket) -> int:
    server, engine = _Server(configure(app, settings)), app.state.engine
    url = f"http://{_address(*listener.getsockname()[:2])}"
    watch = asyncio.create_task(_watch(server, engine, settings, url))
    try:
        await server.serve(sockets=[listener])
    finally:
        watch.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watch
    if not engine.fatal:
        return 0
    if settings.log_format == "json":
        log.critical(engine.fatal)
    else:
        print(engine.fatal, file=sys.stderr)
    return 1


async def _watch(server: _Server, engine: Engine, settings: Settings, url: str) -> None:
    """Print the URL once the model is loaded, then wait for the shutdown and drain the engine."""
    # On a terminal only: a log has no use for it, and its disk may be full.
    waiting = Console(stderr=True).status(escape(f"Loading {settings.model}"))
    with waiting if sys.stderr.isatty() else contextlib.nullcontext():
        while not (engine.ready or _stopping(server, engine)):
            await asyncio.sleep(TICK)
    if engine.ready:
        with contextlib.suppress(OSError):  # standard output may be closed
            print(announce(url, engine, settings), flush=True)
    while not _stopping(server, engine):
        await asyncio.sleep(TICK)
    try:
        if not engine.fatal:
            log.info(
                "shutting down: running requests have %g s to finish", settings.drain_timeout_s
            )
            await engine.stop(settings.drain_timeout_s)
    finally:
        server.should_exit = True


def _stopping(server: _Server, engine: Engine) -> bool:
    return server.stop_requested or server.should_exit or engine.fatal is not None


def announce(url: str, engine: Engine, settings: Settings) -> str:
    """The line on standard output once the model is ready."""
    message = f"listening on {url}"
    if settings.log_format == "text":
        return message
    model, bundle = engine.info["model"], engine.info.get("bundle") or {}
    fields = {
        "url": url,
        "model": model["name"],
        "model_sha256": model.get("sha256"),
        "bundle_sha256": bundle.get("prompts_sha256"),
        "dtype": model.get("dtype"),
        "device": model.get("device"),
    }
    record = {"name": log.name, "levelname": "INFO", "msg": message, "fields": fields}
    return logs.JSONFormatter().format(logging.makeLogRecord(record))


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
