"""The server, writing down when a request reaches each stage. For one request at a time.

The stages are calls that are there anyway, wrapped here in the API process and in the worker.
Instants are of the monotonic clock, which processes share. They go to the file that STAMPS names.
"""

import asyncio
import functools
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.harness.server import Server, read_knobs
from service.messages import Task
from service.settings import Settings

STAGES = {
    "called": "HTTP, from the client to the application",
    "checked": "routing, key, limits, body, JSON, price",
    "decoded": "**decoding**",
    "submitted": "similarity, and the seed of the views",
    "taken": "queue, and the way to the worker",
    "prepared": "labels from the cache, and the batch",
    "computed": "**adapting and predicting**",
    "returned": "the way back",
    "told": "metrics, and the answer",
    "received": "HTTP, from the application to the client",
}
"""What ends at each instant, in this order. The client knows when it has `received`."""


def serve_stamped(stamps: Path) -> Server:
    """The server with its defaults, whose instants go to this file."""
    command = (sys.executable, "-m", "benchmarks.stamped")
    return Server(command=command, env={"STAMPS": str(stamps)})


def read_stamps(stamps: Path) -> list[tuple[float, str]]:
    """All instants and the names of what ended then, in order."""
    lines = map(str.split, stamps.read_text().splitlines())
    return sorted((float(instant), name) for instant, name in lines)


def stamp(name: str) -> None:
    """Write down that a stage ends now."""
    os.write(_open_stamps(), f"{time.monotonic():.6f} {name}\n".encode())


@functools.cache
def _open_stamps() -> int:
    return os.open(os.environ["STAMPS"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)


def wrap(owner: Any, method: str, *, before: str = "", after: str = "") -> None:
    """Stamp the calls of `owner.method`, which may be a coroutine."""
    call = getattr(owner, method)

    @functools.wraps(call)
    async def wait(*arguments: Any, **named: Any) -> Any:
        if before:
            stamp(before)
        result = await call(*arguments, **named)
        if after:
            stamp(after)
        return result

    @functools.wraps(call)
    def run(*arguments: Any, **named: Any) -> Any:
        if before:
            stamp(before)
        result = call(*arguments, **named)
        if after:
            stamp(after)
        return result

    setattr(owner, method, wait if asyncio.iscoroutinefunction(call) else run)


def make_runner(settings: Settings, index: int) -> Any:
    """The worker's runner, with stamps."""
    from service.worker.runner import Runner

    runner = Runner(settings, index)
    run = runner.run

    def run_stamped(
        batch: list[Task], settle: Callable[..., None], cancelled: Callable[[str], bool]
    ) -> dict[str, int]:
        def settle_stamped(*result: Any) -> None:
            stamp("computed")
            settle(*result)

        stamp("taken")
        return run(batch, settle_stamped, cancelled)

    runner.run = run_stamped  # type: ignore[method-assign]
    wrap(runner.classifier, "classify", before="prepared")
    return runner


def main(flags: list[str]) -> int:
    """Serve, with stamps."""
    from service.engine.engine import Engine
    from service.http.access_log import AccessLog
    from service.http.routes import classify
    from service.intake.decoders import Decoders
    from service.server import serve
    from service.worker.supervisor import WorkerProcess

    wrap(AccessLog, "__call__", before="called")
    wrap(Decoders, "decode", before="checked", after="decoded")
    wrap(Engine, "submit", before="submitted")
    wrap(Engine, "on_result", before="returned")
    wrap(classify, "respond", after="told")
    settings = read_knobs(flags)
    return serve(settings, WorkerProcess(settings, 0, runner="benchmarks.stamped:make_runner"))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
