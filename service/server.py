"""The server process: one uvicorn, from the first signal of readiness to the last answer."""

import asyncio
import contextlib
import socket
import sys
from types import FrameType

import uvicorn
from fastapi import FastAPI
from rich.console import Console
from rich.markup import escape

from service.app import create_app
from service.engine.engine import Engine
from service.http.connections import limit_connections, raise_descriptor_limit
from service.intake.malloc import keep_freed_memory
from service.settings import Settings
from service.telemetry import logs
from service.worker.supervisor import Backend

TICK = 0.05  # seconds
KEEP_ALIVE = 75  # seconds; longer than a usual proxy's, so that the proxy closes first
LAST_WORDS = 5  # seconds for answers to be written once the work is over


class _Server(uvicorn.Server):
    """Uvicorn would close its socket at the first signal; `drained` comes in between, so that
    readiness can be seen to fall while the accepted requests finish."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.asked_to_stop = False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.asked_to_stop:
            self.should_exit = self.force_exit = True
        self.asked_to_stop = True


def serve(settings: Settings, backend: Backend | None = None) -> int:
    """Serve until SIGTERM or SIGINT; the exit status, 1 when the model cannot be served.

    Raises OSError when the address cannot be had. `backend` is for tests, as in `create_app`.
    """
    logs.configure(settings.log_format)
    raise_descriptor_limit()
    keep_freed_memory()
    with listen(settings.host, settings.port) as listener:
        return asyncio.run(_run(create_app(settings, backend), settings, listener))


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises OSError when the address cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.create_server((host, port), family=family)
    # Connections inherit it. asyncio sets it only on sockets whose protocol number is spelled out;
    # without it an answer's body waits for the client to acknowledge its head, often for 40 ms.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def configure(app: FastAPI, settings: Settings, last_words: int = LAST_WORDS) -> uvicorn.Config:
    """How HTTP is spoken, here and in the tests."""
    return uvicorn.Config(
        app,
        http=limit_connections(settings.upload_timeout_ms / 1000),
        log_config=None,
        access_log=False,
        server_header=False,
        ws="none",
        lifespan="on",
        timeout_keep_alive=KEEP_ALIVE,
        timeout_graceful_shutdown=last_words,
    )


async def _run(app: FastAPI, settings: Settings, listener: socket.socket) -> int:
    server = _Server(configure(app, settings))
    watch = asyncio.create_task(_watch(server, app.state.engine, settings, _url(listener)))
    try:
        await server.serve(sockets=[listener])
    finally:
        watch.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watch
    if app.state.engine.fatal:
        print(app.state.engine.fatal, file=sys.stderr)
        return 1
    return 0


async def _watch(server: _Server, engine: Engine, settings: Settings, url: str) -> None:
    """Tell when the model is loaded, then wait for the end and bring it about in order."""
    # On a terminal only: elsewhere nobody watches, and the disk below a log may be full.
    waiting = Console(stderr=True).status(escape(f"Loading {settings.model}"))
    with waiting if sys.stderr.isatty() else contextlib.nullcontext():
        while not (engine.ready or _over(server, engine)):
            await asyncio.sleep(TICK)
    if engine.ready:
        with contextlib.suppress(OSError):  # nobody may be left to read it
            print(f"listening on {url}", flush=True)
    while not _over(server, engine):
        await asyncio.sleep(TICK)
    try:
        if not engine.fatal:
            await engine.stop(settings.drain_timeout_s)
    finally:
        server.should_exit = True


def _over(server: _Server, engine: Engine) -> bool:
    return server.asked_to_stop or server.should_exit or engine.fatal is not None


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
