"""A real server on a real socket, in a thread, with a fake worker behind it."""

import asyncio
import io
import os
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
import uvicorn
from PIL import Image
from skimage import data

from service.app import create_app
from service.server import configure, listen
from service.settings import Settings
from tests.fake_worker import FakeWorker

# For torch, here and in the processes that tests start: tiny models run faster on one thread.
os.environ.setdefault("OMP_NUM_THREADS", "1")


class Server:
    """A running server: its address, its app, its fake worker, and a client of its own."""

    def __init__(self, worker: FakeWorker, **knobs: Any) -> None:
        self.worker = worker
        settings = Settings(**{"decoders": 1} | knobs)  # to start faster
        self.app = create_app(settings, worker)
        self._listener = listen("127.0.0.1", 0)
        self.port: int = self._listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._uvicorn = uvicorn.Server(configure(self.app, settings, shutdown_timeout=1))
        self._running = threading.Event()
        self._thread = threading.Thread(target=asyncio.run, args=(self._run(),))
        self._thread.start()
        assert self._running.wait(10)
        self.http = httpx.Client(base_url=self.url, timeout=20)
        if worker.automatic:
            self.wait(lambda: self.app.state.engine.ready)

    async def _run(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.loop.call_soon(self._running.set)
        await self._uvicorn.serve(sockets=[self._listener])

    def call(self, act: Callable[[], Any]) -> Any:
        """Do something on the server's event loop, where its parts live; the result."""

        async def run() -> Any:
            return act()

        return asyncio.run_coroutine_threadsafe(run(), self.loop).result(10)

    def wait(self, until: Callable[[], object], seconds: float = 10) -> None:
        """Wait until something is true on the server's event loop."""

        async def poll() -> None:
            async with asyncio.timeout(seconds):
                while not until():
                    await asyncio.sleep(0.002)

        asyncio.run_coroutine_threadsafe(poll(), self.loop).result(seconds + 5)

    def stop(self) -> None:
        self.http.close()
        self._uvicorn.should_exit = True
        self._thread.join(20)
        assert not self._thread.is_alive()


@pytest.fixture
def start() -> Iterator[Callable[..., Server]]:
    """Starts servers with knobs and a worker of the test's choice."""
    started: list[Server] = []

    def start(worker: FakeWorker | None = None, **knobs: Any) -> Server:
        started.append(Server(worker or FakeWorker(), **knobs))
        return started[-1]

    yield start
    for server in started:
        server.stop()


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """One server with the default settings for all tests that leave it as it is."""
    server = Server(FakeWorker())
    yield server
    server.stop()


@pytest.fixture(scope="session")
def photo() -> bytes:
    """A photograph as a JPEG file."""
    buffer = io.BytesIO()
    Image.fromarray(data.chelsea()).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Iterator[None]:
    """Keep measuring coverage after pyautoattack, which removes every trace function."""
    tracer = sys.gettrace()
    try:
        yield
    finally:
        if sys.gettrace() is not tracer:
            sys.settrace(tracer)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Say which tests were skipped and why, however quiet the run."""
    for report in terminalreporter.stats.get("skipped", []):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        terminalreporter.write_line(f"SKIPPED {report.nodeid}: {reason}", yellow=True)
