"""From an accepted request to its answer: the queue, the batches, the workers.

A request first reserves a slot, before its image is decoded, and is then submitted. From then on
it settles exactly once: with an answer or a typed error, at its deadline, by its cancellation, or
at the shutdown. Everything here runs on the event loop; the work itself is done by other
processes, whose events arrive at `_on_event`.
"""

import asyncio
import contextlib
import itertools
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from service.errors import (
    ERRORS,
    DeadlineExceeded,
    InternalError,
    NotReady,
    QueueFull,
    ServiceError,
)
from service.metrics import Metrics
from service.scheduler import Item, Scheduler, count_tokens
from service.settings import Settings
from service.slots import Slot, Slots
from service.tally import tally_answer, tally_batch, tally_counts
from service.work import Answer, Beat, Failure, Fatal, Finished, Ready, Settled, Work
from service.worker import Backend, Event, Lost

GRACE = 5.0  # seconds past its deadline that a request in a batch is still waited for
RECOVERY = 5.0  # seconds after which a client may find a worker ready again
SMOOTHING = 0.2  # weight of the last batch in the mean seconds per request

Outcome = Answer | ServiceError  # a value, never raised into a future: nobody may be left to look


@dataclass(slots=True, eq=False)
class _Request:
    slot: Slot
    outcome: asyncio.Future[Outcome]


@dataclass(slots=True, eq=False)
class _Worker:
    """A worker as the engine sees it. `running` holds the items of its batch that have not
    settled; it stays `busy` until the batch is finished, which may be later."""

    name: str
    backend: Backend
    ready: Ready | None = None
    exhausted: bool = False
    busy: bool = False
    size: int = 0
    began: float = 0.0
    running: dict[str, Item] = field(default_factory=dict)

    @property
    def free(self) -> bool:
        return self.ready is not None and not self.busy


class Engine:
    """Accepts requests, batches them, hands the batches to workers, settles every request."""

    def __init__(
        self,
        settings: Settings,
        metrics: Metrics,
        backends: Sequence[Backend],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings = settings
        self._metrics = metrics
        self._clock = clock
        self._workers = [_Worker(str(i), backend) for i, backend in enumerate(backends)]
        self._slots = Slots(settings.max_queue_size, settings.max_body_bytes, self._on_change)
        self._scheduler = Scheduler(
            settings.max_batch_size, settings.max_batch_tokens, settings.max_queue_delay_ms / 1000
        )
        self._requests: dict[str, _Request] = {}
        self._serial = itertools.count()
        self._model: Ready | None = None
        self._seconds_per_request = 1.0
        self._fatal: str | None = None
        self._draining = False
        self._drained = asyncio.Event()
        self._stopped = False
        self._timer: asyncio.TimerHandle | None = None

    @property
    def ready(self) -> bool:
        """Whether a request would be worked on now."""
        return not self._draining and any(worker.ready for worker in self._workers)

    @property
    def started(self) -> bool:
        """Whether a worker was ready once."""
        return self._model is not None

    @property
    def alive(self) -> bool:
        """False when no worker will ever be ready again."""
        return self._fatal is None and not all(worker.exhausted for worker in self._workers)

    @property
    def fatal(self) -> str | None:
        """Why the model cannot be served, in one sentence."""
        return self._fatal

    @property
    def info(self) -> dict[str, Any]:
        """What the workers say of the model (nothing before one was ready), and their number."""
        ready = sum(worker.ready is not None for worker in self._workers)
        workers = {"configured": len(self._workers), "ready": ready}
        return {**(self._model.info if self._model else {}), "workers": workers}

    @property
    def queue_depth(self) -> int:
        """Requests being decoded or waiting for a batch."""
        return len(self._slots)

    async def start(self) -> None:
        """Start the workers; `ready` turns true when the first has loaded its model."""
        for worker in self._workers:
            self._metrics.worker_up.labels(worker.name).set(0)
            worker.backend.start(partial(self._on_event, worker))

    def drain(self) -> None:
        """Accept nothing more; what was accepted goes on."""
        self._draining = True
        self._on_change()

    async def stop(self, drain_timeout: float) -> None:
        """Drain for at most `drain_timeout` seconds, fail what is left, stop the workers."""
        if self._stopped:
            return
        self.drain()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._drained.wait(), drain_timeout)
        self._stopped = True
        self._fail_all("The server is shutting down.")
        for worker in self._workers:
            worker.ready = None
            self._metrics.worker_up.labels(worker.name).set(0)
        await asyncio.gather(*(worker.backend.stop() for worker in self._workers))

    def reserve(self, size_bytes: int) -> Slot:
        """Take a place in the queue for an upload of `size_bytes`, before it is decoded.

        Raises QueueFull or NotReady, with `retry_after`.
        """
        if not self.ready:
            reason, state = (
                ("draining", "is shutting down")
                if self._draining
                else ("not_ready", "is not ready")
            )
            self._metrics.rejected.labels(reason).inc()
            raise NotReady(f"The server {state}.", retry_after=_jitter(RECOVERY))
        slot = self._slots.take(size_bytes, self._clock())
        if slot is None:
            self._metrics.rejected.labels("queue_full").inc()
            ahead = len(self._slots) + sum(len(worker.running) for worker in self._workers)
            wait = ahead * self._seconds_per_request / sum(bool(w.ready) for w in self._workers)
            raise QueueFull("The queue is full.", retry_after=_jitter(wait))
        return slot

    async def submit(self, slot: Slot, work: Work) -> Answer:
        """Answer one request. Cancelling the caller withdraws it.

        Raises ServiceError: DeadlineExceeded, NotReady, or what the worker found wrong.
        """
        if self._stopped or not self.alive or self._model is None:
            raise NotReady("The server is not ready.", retry_after=_jitter(RECOVERY))
        # Clients choose request ids, so two may be equal.
        work = replace(work, id=f"{work.id}/{next(self._serial)}")
        now = self._clock()
        request = _Request(slot, asyncio.get_running_loop().create_future())
        self._requests[work.id] = request
        tokens = count_tokens(work, self._model, self._settings.hypothesis_template)
        self._scheduler.add(Item(work, (work.method, work.views), tokens, now, work.deadline))
        try:
            self._pump()
            async with asyncio.timeout(work.deadline + GRACE - now):
                outcome = await request.outcome
        except TimeoutError:
            outcome = DeadlineExceeded("The worker did not answer before the deadline.")
        finally:
            self._withdraw(work.id)
        if isinstance(outcome, ServiceError):
            raise outcome
        return outcome

    def _withdraw(self, id: str) -> None:
        """Forget a request, whose outcome is known or no longer wanted."""
        request = self._requests.pop(id)
        self._scheduler.remove(id)
        for worker in self._workers:
            if worker.running.pop(id, None):
                worker.backend.cancel(frozenset({id}))
                self._metrics.truncated.labels("cancelled").inc()
        request.slot.release()

    def _settle(self, id: str, outcome: Outcome) -> None:
        request = self._requests.get(id)
        if request and not request.outcome.done():
            request.outcome.set_result(outcome)

    def _fail_all(self, message: str) -> None:
        for id in self._requests:
            self._scheduler.remove(id)
            self._settle(id, NotReady(message, retry_after=_jitter(RECOVERY)))

    def _pump(self) -> None:
        """Do what is due now, and come back when something will be."""
        now = self._clock()
        for item in self._scheduler.expire(now):
            self._settle(item.work.id, DeadlineExceeded("The deadline passed in the queue."))
        for worker in self._workers:
            if worker.free and (batch := self._scheduler.next_batch(now)):
                self._dispatch(worker, batch, now)
        if self._timer:
            self._timer.cancel()
        wake = self._scheduler.wake_at(any(worker.free for worker in self._workers))
        if wake is not None:
            delay = max(0.0, wake - now)
            self._timer = asyncio.get_running_loop().call_later(delay, self._pump)

    def _dispatch(self, worker: _Worker, batch: list[Item], now: float) -> None:
        worker.busy, worker.size, worker.began = True, len(batch), now
        worker.running = {item.work.id: item for item in batch}
        for item in batch:
            slot = self._requests[item.work.id].slot
            slot.waited = now - item.enqueued
            slot.release()
            if not item.attempts:
                self._metrics.queue_seconds.observe(now - slot.since)
        works = [item.work for item in batch]
        tally_batch(self._metrics, works)
        worker.backend.run(works)

    def _on_event(self, worker: _Worker, event: Event) -> None:
        match event:
            case Beat(memory_bytes=memory):
                self._metrics.device_memory_bytes.labels(worker.name).set(memory)
            case Ready():
                worker.ready = self._model = event
                self._metrics.worker_up.labels(worker.name).set(1)
                if not self._settings.max_batch_tokens:
                    self._scheduler.max_batch_tokens = event.max_batch_tokens
            case Settled(id=id, result=result):
                # Popped once: a second answer, or one that nobody waits for, finds nothing.
                if item := worker.running.pop(id, None):
                    self._on_result(item.work, result)
            case Finished(counts=counts):
                self._on_finished(worker, counts)
            case Lost():
                self._on_lost(worker, event)
            case Fatal(message=message):
                self._fatal = message
                self._fail_all("The model cannot be served.")
        self._pump()

    def _on_result(self, work: Work, result: Answer | Failure) -> None:
        if isinstance(result, Answer):
            tally_answer(self._metrics, work, result)
            self._settle(work.id, result)
        else:
            error = ERRORS.get(result.error_type, InternalError)
            self._settle(work.id, error(result.message))

    def _on_finished(self, worker: _Worker, counts: dict[str, int]) -> None:
        forgotten, worker.running, worker.busy = worker.running, {}, False
        for id in forgotten:
            self._settle(id, InternalError("The worker gave no answer."))
        last = (self._clock() - worker.began) / worker.size
        self._seconds_per_request += SMOOTHING * (last - self._seconds_per_request)
        tally_counts(self._metrics, counts)

    def _on_lost(self, worker: _Worker, event: Lost) -> None:
        """Queue its requests again, each to run alone: whichever of them killed the worker takes
        no other with it the second time."""
        lost, worker.running, worker.busy = worker.running, {}, False
        worker.ready, worker.exhausted = None, not event.restarting
        self._metrics.worker_up.labels(worker.name).set(0)
        if event.restarting:
            self._metrics.worker_restarts.inc()
        self._scheduler.put_back(
            replace(item, key=item.work.id, attempts=1)
            for item in lost.values()
            if not item.attempts
        )
        for id, item in lost.items():
            if item.attempts:
                again = _jitter(RECOVERY)
                self._settle(id, NotReady("The worker was lost, twice.", retry_after=again))
        if not self.alive:
            self._fail_all("No worker can be started.")

    def _on_change(self) -> None:
        self._metrics.queue_depth.set(len(self._slots))
        if self._draining and not self._slots and not self._requests:
            self._drained.set()


def _jitter(seconds: float) -> float:
    """At least 1 s, and spread: clients refused together should not return together."""
    return max(1.0, seconds * random.uniform(0.8, 1.2))
