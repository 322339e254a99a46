"""An engine with fake workers under a virtual clock.

Time jumps to the next timer when there is nothing else to do, and a wait that nothing can end is an
error.
"""

import asyncio
import contextlib
import functools
import itertools
import math
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from typing import Any

import numpy as np

from service.engine.engine import Engine
from service.engine.permits import Permit
from service.messages import Answer, Task
from service.settings import Settings
from service.telemetry.metrics import Metrics
from tests.fake_worker import FakeWorker


class VirtualLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        super().__init__()
        self._now = 0.0
        self._clock_resolution = 0.0  # a timer is due strictly after its instant
        select = self._selector.select

        def jump(timeout: float | None) -> Any:
            events = select(0)
            if not events:
                assert timeout is not None, "a wait that nothing can end"
                self._now = math.nextafter(self._now + timeout, math.inf)
            return events

        self._selector.select = jump

    def time(self) -> float:
        return self._now


def virtual(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        mishaps: list[dict[str, Any]] = []
        with asyncio.Runner(loop_factory=VirtualLoop) as runner:
            runner.get_loop().set_exception_handler(lambda _, mishap: mishaps.append(mishap))
            runner.run(test(*args, **kwargs))
        assert not mishaps

    return run


def now() -> float:
    return asyncio.get_running_loop().time()


@contextlib.contextmanager
def reserved(engine: Engine, size_bytes: int, caller: str = "") -> Iterator[Permit]:
    permit = engine.reserve(size_bytes, caller)
    try:
        yield permit
    finally:
        permit.release()


class Harness:
    """An engine with fake workers, and ways to use it."""

    def __init__(self, *workers: FakeWorker, **knobs: Any) -> None:
        self.workers = workers
        self._serial = itertools.count()
        self.metrics = Metrics()
        # By default a worker starts at once; here it waits, so that requests can meet in a batch.
        settings = Settings(**{"max_queue_delay_ms": 5.0, **knobs})
        self.engine = Engine(settings, self.metrics, workers, clock=now)

    async def measure_pace(self) -> None:
        """Answer so many expensive requests that the mean forgets its first guess."""
        for _ in range(20):
            await self.ask(heavy=True)

    async def ask(
        self,
        id: str = "x",
        label: str = "cat",
        views: int = 4,
        timeout: float = 60.0,
        caller: str = "",
        heavy: bool = False,
    ) -> Answer:
        with reserved(self.engine, 1000, caller) as permit:
            image = np.zeros((1, 1, 3), np.uint8)
            labels, steps = (label, "other"), 1
            if heavy:
                # Never in the text cache.
                first = f"{next(self._serial)} {'word ' * 48}"
                labels, steps, views = (first, *("word " * 50,) * 999), 8, 64
            deadline = now() + timeout
            work = Task(id, image, labels, "a {}", "tapt", steps, views, "all", 0, deadline)
            return await self.engine.submit(permit, work)

    def asking(self, *args: Any, **kwargs: Any) -> asyncio.Task[Answer]:
        return asyncio.create_task(self.ask(*args, **kwargs))

    def metric(self, name: str, **labels: str) -> float | None:
        return self.metrics.registry.get_sample_value(f"tapt_{name}", labels)

    def assert_nothing_left(self) -> None:
        engine = self.engine
        assert (engine.queue_depth, engine._permits.bytes) == (0, 0)
        assert not engine._requests
        assert not engine._scheduler._items
        assert not engine._scheduler._ranks
        assert engine._pool.running == 0
        assert engine._pool.wake_at() is None
        assert self.metric("queue_depth") == 0
        assert self.metric("queue_seconds_expected") == 0


@asynccontextmanager
async def open_engine(*workers: FakeWorker, **knobs: Any) -> AsyncIterator[Harness]:
    harness = Harness(*workers, **knobs)
    await harness.engine.start()
    await asyncio.sleep(0.001)
    yield harness
    await harness.engine.stop(0)
    harness.assert_nothing_left()


def by_hand(**kwargs: Any) -> FakeWorker:
    return FakeWorker(automatic=False, **kwargs)


def sizes(worker: FakeWorker) -> list[int]:
    return [len(batch) for batch in worker.batches]
