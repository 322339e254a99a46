"""The workers as the engine sees them: which are ready, and what each of them runs."""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

from service.metrics import Metrics
from service.scheduler import Item
from service.tally import tally_batch, tally_counts
from service.work import (
    Answer,
    Beat,
    Failure,
    Fatal,
    Finished,
    Glimpse,
    Glimpsed,
    Ready,
    Settled,
)
from service.worker import Backend, Event, Lost

SMOOTHING = 0.2  # weight of the last batch in the mean seconds per request


class Listener(Protocol):
    """Who gives the batches, and is told what becomes of them."""

    def on_result(self, item: Item, result: Answer | Failure) -> None:
        """Called once for each item of a batch, unless it was cancelled or lost."""

    def on_glimpse(self, item: Item, glimpse: Glimpse) -> None:
        """News of an item whose result is still to come."""

    def on_lost(self, items: list[Item]) -> None:
        """A worker is gone; these were in its batch and had no result."""

    def on_event(self) -> None:
        """Called last after every event: a worker may be free, ready, or given up."""


@dataclass(slots=True, eq=False)
class _Worker:
    """`running` holds the items of its batch that have no result yet; it stays `busy` until the
    batch is finished, which may be later."""

    name: str
    backend: Backend
    ready: bool = False
    exhausted: bool = False
    busy: bool = False
    size: int = 0
    began: float = 0.0
    running: dict[str, Item] = field(default_factory=dict)


class Fleet:
    """All workers; one batch at a time is in flight for each.

    `model` is what the last Ready said, `fatal` the sentence of a model that cannot be served,
    `seconds_per_request` a running mean of the time of a batch over its size.
    """

    def __init__(
        self,
        metrics: Metrics,
        backends: Sequence[Backend],
        listener: Listener,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.model: Ready | None = None
        self.fatal: str | None = None
        self.seconds_per_request = 1.0
        self._metrics = metrics
        self._listener = listener
        self._clock = clock
        self._workers = [_Worker(str(i), backend) for i, backend in enumerate(backends)]

    @property
    def ready(self) -> int:
        """How many have their model loaded."""
        return sum(worker.ready for worker in self._workers)

    @property
    def free(self) -> bool:
        """Whether one is ready and has no batch."""
        return any(worker.ready and not worker.busy for worker in self._workers)

    @property
    def alive(self) -> bool:
        """False when none will ever be ready again."""
        return self.fatal is None and not all(worker.exhausted for worker in self._workers)

    @property
    def running(self) -> int:
        """How many requests are in batches and have no result."""
        return sum(len(worker.running) for worker in self._workers)

    @property
    def info(self) -> dict[str, Any]:
        """What the workers say of the model (nothing before one was ready), and their number."""
        workers = {"configured": len(self._workers), "ready": self.ready}
        return {**(self.model.info if self.model else {}), "workers": workers}

    def start(self) -> None:
        for worker in self._workers:
            self._set_ready(worker, False)
            worker.backend.start(partial(self._on_event, worker))

    async def stop(self) -> None:
        for worker in self._workers:
            self._set_ready(worker, False)
        await asyncio.gather(*(worker.backend.stop() for worker in self._workers))

    def run(self, batch: list[Item]) -> None:
        """Give a batch to a free worker."""
        worker = next(worker for worker in self._workers if worker.ready and not worker.busy)
        worker.busy, worker.size, worker.began = True, len(batch), self._clock()
        worker.running = {item.work.id: item for item in batch}
        works = [item.work for item in batch]
        tally_batch(self._metrics, works)
        worker.backend.run(works)

    def cancel(self, id: str) -> bool:
        """Drop an item from its batch; False when it is in none, or has its result."""
        for worker in self._workers:
            if worker.running.pop(id, None):
                worker.backend.cancel(frozenset({id}))
                return True
        return False

    def _set_ready(self, worker: _Worker, ready: bool) -> None:
        worker.ready = ready
        self._metrics.worker_up.labels(worker.name).set(ready)

    def _on_event(self, worker: _Worker, event: Event) -> None:
        match event:
            case Beat(memory_bytes=memory):
                self._metrics.device_memory_bytes.labels(worker.name).set(memory)
            case Ready():
                self.model = event
                self._set_ready(worker, True)
            case Glimpsed(id=id, glimpse=glimpse):
                if item := worker.running.get(id):
                    self._listener.on_glimpse(item, glimpse)
            case Settled(id=id, result=result):
                # Popped once: a second result, or one that nobody waits for, finds nothing.
                if item := worker.running.pop(id, None):
                    self._listener.on_result(item, result)
            case Finished(counts=counts) if worker.busy:
                seconds = (self._clock() - worker.began) / worker.size
                self.seconds_per_request += SMOOTHING * (seconds - self.seconds_per_request)
                tally_counts(self._metrics, counts)
                for item in self._take_all(worker):
                    self._listener.on_result(item, Failure("internal", "The worker was silent."))
            case Lost(restarting=restarting):
                self._set_ready(worker, False)
                worker.exhausted = not restarting
                self._metrics.worker_restarts.inc(restarting)
                self._listener.on_lost(self._take_all(worker))
            case Fatal(message=message):
                self.fatal = message
        self._listener.on_event()

    def _take_all(self, worker: _Worker) -> list[Item]:
        """End the batch of a worker; what of it has no result."""
        items = list(worker.running.values())
        worker.busy, worker.running = False, {}
        return items
