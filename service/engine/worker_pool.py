"""The workers: which are ready, and which batches each of them has."""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

from service.engine.scheduler import Item
from service.messages import (
    Answer,
    Failure,
    Fatal,
    Finished,
    Heartbeat,
    Progress,
    ProgressEvent,
    Ready,
    Settled,
)
from service.telemetry.metrics import Metrics
from service.worker.supervisor import Backend, Event, Lost

SMOOTHING = 0.2  # weight of the last batch in the means

log = logging.getLogger("tapt.workers")


class Listener(Protocol):
    """What is told about the batches; the engine."""

    def on_begin(self, items: list[Item]) -> None:
        """A worker begins a batch; these of its items are still wanted."""

    def on_result(self, item: Item, result: Answer | Failure) -> None:
        """An item has its result. Called once for each, unless it was dropped or lost before."""

    def on_progress(self, item: Item, event: ProgressEvent) -> None:
        """An item made progress; its result follows."""

    def on_lost(self, running: list[Item], waiting: list[Item]) -> None:
        """A worker is lost, with the running items without a result and those not yet begun."""

    def on_event(self) -> None:
        """Called after every event: a worker may have become free, ready or lost."""


@dataclass(slots=True, eq=False)
class _Batch:
    """`items` have no result yet and are still wanted; `size` is how many they were when the batch
    began, `price` the sum of their prices. `complete`: none of them was dropped, cut short or
    failed since, so all of the price was worked off."""

    items: dict[str, Item]
    size: int = 0
    price: float = 0.0
    began: float = 0.0
    complete: bool = True


@dataclass(slots=True, eq=False)
class _Worker:
    """The first batch runs until it is finished, even if nobody waits for it any more. A second one
    may wait in the worker, so that it can begin at once."""

    name: str
    backend: Backend
    model: Ready | None = None  # None while the worker is not ready
    exhausted: bool = False  # several starts in a row failed
    batches: deque[_Batch] = field(default_factory=deque)

    @property
    def ready(self) -> bool:
        return self.model is not None

    @property
    def running(self) -> list[Item]:
        return list(self.batches[0].items.values()) if self.batches else []

    @property
    def waiting(self) -> list[Item]:
        return list(self.batches[1].items.values()) if len(self.batches) > 1 else []


class WorkerPool:
    """All workers; each runs one batch at a time and may hold the next.

    Attributes:
        model: the last Ready.
        fatal: why no worker will be ready, in one sentence: the model cannot be loaded, and no
            worker ever had it; or several starts in a row have failed for every worker. The
            service must then be started again.
        seconds_per_request: a running mean of a batch's time divided by its size.
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
        self._mean_seconds, self._mean_price = 0.0, 1.0
        self._metrics = metrics
        self._listener = listener
        self._clock = clock
        self._workers = [_Worker(str(i), backend) for i, backend in enumerate(backends)]

    @property
    def ready(self) -> int:
        """How many workers have loaded the model."""
        return sum(worker.ready for worker in self._workers)

    @property
    def free(self) -> bool:
        """Whether a worker is ready and has no batch."""
        return any(worker.ready and not worker.batches for worker in self._workers)

    @property
    def accepts(self) -> bool:
        """Whether a worker is ready and can hold another batch."""
        return any(worker.ready and len(worker.batches) < 2 for worker in self._workers)

    @property
    def max_batch_tokens(self) -> int | None:
        """The largest batch that every ready worker has memory for; None if none is ready."""
        budgets = (worker.model.max_batch_tokens for worker in self._workers if worker.model)
        return min(budgets, default=None)

    @property
    def running(self) -> int:
        """How many requests of running batches have no result yet."""
        return sum(len(worker.running) for worker in self._workers)

    @property
    def info(self) -> dict[str, Any]:
        """The model, once a worker has loaded it, and the number of workers."""
        workers = {"configured": len(self._workers), "ready": self.ready}
        return {**(self.model.info if self.model else {}), "workers": workers}

    @property
    def seconds_per_price(self) -> float:
        """Time per unit of price, by the running means over batches."""
        return self._mean_seconds / self._mean_price

    def start(self) -> None:
        for worker in self._workers:
            self._set_model(worker, None)
            worker.backend.start(partial(self._on_event, worker))

    async def stop(self) -> None:
        for worker in self._workers:
            self._set_model(worker, None)
        await asyncio.gather(*(worker.backend.stop() for worker in self._workers))

    def run(self, batch: list[Item]) -> None:
        """Give a batch to a free worker, or to the one whose batch began first."""
        candidates = (
            worker for worker in self._workers if worker.ready and len(worker.batches) < 2
        )
        worker = min(candidates, key=lambda worker: [batch.began for batch in worker.batches])
        worker.batches.append(_Batch({item.task.id: item for item in batch}))
        worker.backend.run([item.task for item in batch])
        if len(worker.batches) == 1:
            self._begin(worker)

    def _begin(self, worker: _Worker) -> None:
        batch, items = worker.batches[0], worker.running
        batch.size, batch.began = len(items), self._clock()
        batch.price, batch.complete = sum(item.price for item in items), True
        if items:
            self._metrics.observe_batch([item.task for item in items])
            self._listener.on_begin(items)

    def cancel(self, id: str) -> bool:
        """Drop an item that nobody waits for any more; whether it was running."""
        for worker in self._workers:
            began = bool(worker.batches) and id in worker.batches[0].items
            if self._drop(worker, [id]):
                return began
        return False

    def expire(self, now: float) -> list[Item]:
        """Drop the items whose deadline has passed before their batch began."""
        expired: list[Item] = []
        for worker in self._workers:
            late = [item.task.id for item in worker.waiting if item.task.deadline <= now]
            expired += self._drop(worker, late)
        return expired

    def recall(self) -> list[Item]:
        """Take back a batch that waits in one worker, for another that is free now."""
        for worker in self._workers:
            if waiting := worker.waiting:
                return self._drop(worker, [item.task.id for item in waiting])
        return []

    def wake_at(self) -> float | None:
        """The instant at which `expire` returns something, if any."""
        waiting = (item for worker in self._workers for item in worker.waiting)
        return min((item.task.deadline for item in waiting), default=None)

    def _drop(self, worker: _Worker, ids: list[str]) -> list[Item]:
        """Take items out of a worker's batches and cancel them there."""
        found = [item for id in ids if (item := self._take(worker, id, False))]
        if found:
            worker.backend.cancel(frozenset(item.task.id for item in found))
        return found

    def _take(self, worker: _Worker, id: str, complete: bool) -> Item | None:
        """Take an item out of its batch; `complete`: all of its price was worked off."""
        for batch in worker.batches:
            if item := batch.items.pop(id, None):
                batch.complete = batch.complete and complete
                return item
        return None

    def _measure(self, batch: _Batch, seconds: float) -> None:
        """Update the means. A batch that ended early tells only that it would have taken longer, or
        clients that leave at once would make their requests look quick."""
        if not batch.complete and seconds < batch.price * self.seconds_per_price:
            return
        self.seconds_per_request += SMOOTHING * (seconds / batch.size - self.seconds_per_request)
        # Means of both, not of the ratio: small batches are mostly overhead.
        self._mean_seconds += SMOOTHING * (seconds - self._mean_seconds)
        self._mean_price += SMOOTHING * (batch.price - self._mean_price)

    def _set_model(self, worker: _Worker, model: Ready | None) -> None:
        worker.model = model
        self._metrics.worker_up.labels(worker.name).set(worker.ready)

    def _lose(self, worker: _Worker, event: Lost) -> None:
        self._set_model(worker, None)
        worker.exhausted = event.exhausted
        if self.fatal is None:
            log.error("worker %s was lost: %s", worker.name, event.reason)
            if all(worker.exhausted for worker in self._workers):
                self.fatal = f"No worker can be started: {event.reason}"
            else:
                self._metrics.worker_restarts.inc()
        running, waiting = worker.running, worker.waiting
        worker.batches.clear()
        self._listener.on_lost(running, waiting)

    def _on_event(self, worker: _Worker, event: Event) -> None:
        match event:
            case Heartbeat(memory_bytes=memory):
                self._metrics.device_memory_bytes.labels(worker.name).set(memory)
            case Ready():
                if self.model is None:
                    self._mean_seconds = event.typical_seconds
                self.model = event
                self._metrics.set_build(event.info)
                self._set_model(worker, event)
                worker.exhausted = False
            case Progress(id=id, event=update):
                if worker.batches and (item := worker.batches[0].items.get(id)):
                    self._listener.on_progress(item, update)
            case Settled(id=id, result=result):
                # A second result, or one for an item that was dropped, finds nothing.
                complete = isinstance(result, Answer) and result.truncated is None
                if item := self._take(worker, id, complete):
                    self._listener.on_result(item, result)
            case Finished(counts=counts) if worker.batches:
                batch = worker.batches.popleft()
                if batch.size:
                    self._measure(batch, self._clock() - batch.began)
                for item in batch.items.values():
                    self._listener.on_result(item, Failure("internal", "The worker gave none."))
                if worker.batches:
                    self._begin(worker)
                self._metrics.add_counts(counts)
            case Lost():
                self._lose(worker, event)
            case Fatal(message=message) if self.model is None:
                # A model that was loaded once can be loaded again when the hub, the disk or the
                # device recovers. Then this worker is like any other that is lost.
                self.fatal = message
        self._listener.on_event()
