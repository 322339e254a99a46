"""From an accepted request to its answer.

A request first reserves a slot, before its image is decoded, and is then submitted. From then on
it settles exactly once: with an answer or a typed error, at its deadline, by its cancellation, or
at the shutdown. Everything here runs on the event loop; the work is done by other processes.
"""

import asyncio
import contextlib
import itertools
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from service.engine.permits import Permit, Permits
from service.engine.retry_after import RetryAfter
from service.engine.scheduler import Item, Scheduler, count_tokens
from service.engine.worker_pool import WorkerPool
from service.errors import (
    ERRORS,
    DeadlineExceeded,
    InternalError,
    NotReady,
    QueueFull,
    ServiceError,
)
from service.messages import Answer, Failure, ProgressEvent, Task
from service.settings import Settings
from service.telemetry.metrics import Metrics
from service.telemetry.record import record_answer
from service.worker.supervisor import Backend

GRACE = 5.0  # seconds past its deadline that a request is still waited for once its batch began
RECOVERY = 5.0  # seconds after which a client may find a worker ready again


Watch = Callable[[ProgressEvent], None]


def look_away(event: ProgressEvent) -> None:
    pass


@dataclass(slots=True, eq=False)
class _Request:
    """An error is a result and not an exception of the future: nobody may be left to look."""

    permit: Permit
    outcome: asyncio.Future[Answer | ServiceError]
    watch: Watch


class Engine:
    """Accepts requests, batches them, hands the batches to the workers, settles every request."""

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
        self._permits = Permits(settings.max_queue_size, settings.max_body_bytes, self._on_slots)
        self._retry_after = RetryAfter()
        self._scheduler = Scheduler(
            settings.max_batch_size, settings.max_batch_tokens, settings.max_queue_delay_ms / 1000
        )
        self._pool = WorkerPool(metrics, backends, self, clock)
        self._requests: dict[str, _Request] = {}
        self._serial = itertools.count()
        self._timer: asyncio.TimerHandle | None = None
        self._draining = False
        self._drained = asyncio.Event()
        self._stopped = False

    @property
    def ready(self) -> bool:
        """Whether a request would be worked on now."""
        return self._pool.ready > 0 and not self._draining

    @property
    def started(self) -> bool:
        """Whether a worker was ready once."""
        return self._pool.model is not None

    @property
    def alive(self) -> bool:
        """False when no worker will ever be ready again."""
        return self._pool.alive

    @property
    def fatal(self) -> str | None:
        """Why the model cannot be served, in one sentence."""
        return self._pool.fatal

    @property
    def info(self) -> dict[str, Any]:
        """What `/info` shows of the model and the workers."""
        return self._pool.info

    @property
    def queue_depth(self) -> int:
        """Requests being decoded, or whose batch has not begun."""
        return len(self._permits)

    async def start(self) -> None:
        """Start the workers; `ready` turns true when the first has loaded its model."""
        self._pool.start()

    def drain(self) -> None:
        """Accept nothing more; what was accepted goes on."""
        self._draining = True
        self._on_slots()

    async def stop(self, drain_timeout: float) -> None:
        """Drain for at most `drain_timeout` seconds, fail what is left, stop the workers."""
        if self._stopped:
            return
        self.drain()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._drained.wait(), drain_timeout)
        self._stopped = True
        self._fail_all("The server is shutting down.")
        await self._pool.stop()

    def reserve(self, size_bytes: int) -> Permit:
        """Take a place in the queue for an upload of `size_bytes`, before it is decoded.

        Raises QueueFull or NotReady, with `retry_after`.
        """
        refusal: ServiceError
        if self._draining:
            reason = "draining"
            refusal = NotReady("The server is shutting down.", retry_after=_jitter(RECOVERY))
        elif not self.ready:
            reason = "not_ready"
            refusal = NotReady("The server is not ready.", retry_after=_jitter(RECOVERY))
        elif permit := self._permits.take(size_bytes, self._clock(), self._room()):
            if 2 * len(self._permits) <= self._settings.max_queue_size:
                self._retry_after.clear()
            return permit
        else:
            reason = "queue_full"
            refusal = QueueFull("The queue is full.", retry_after=self._turn())
        self._metrics.rejected.labels(reason).inc()
        raise refusal

    def _room(self) -> int:
        """How many may wait now. Who is let in waits for those that run as well, so these take
        places too; but each worker's next batch may always gather."""
        places = self._settings.max_queue_size
        gathering = self._pool.ready * self._settings.max_batch_size
        return max(places - self._pool.running, min(places, gathering))

    def _turn(self) -> float:
        """Seconds after which there will be room for one who is refused now."""
        pace = self._pool.seconds_per_request / self._pool.ready
        wait = (len(self._permits) + self._pool.running) * pace
        # Clients are told whole seconds, so no more may share one than the queue holds.
        pace = max(pace, 1 / self._settings.max_queue_size)
        return max(1.0, self._retry_after.book(self._clock(), wait, pace))

    async def submit(self, permit: Permit, work: Task, watch: Watch = look_away) -> Answer:
        """Answer one request. Cancelling the caller withdraws it. `watch` hears of what can be
        seen before the answer.

        Raises ServiceError: DeadlineExceeded, NotReady, or what the worker found wrong.
        """
        model = self._pool.model
        if self._stopped or not self.alive or model is None:
            raise NotReady("The server is not ready.", retry_after=_jitter(RECOVERY))
        # Clients choose request ids, so two may be equal.
        work = replace(work, id=f"{work.id}/{next(self._serial)}")
        tokens = count_tokens(work, model, self._settings.hypothesis_template)
        now = self._clock()
        request = _Request(permit, asyncio.get_running_loop().create_future(), watch)
        self._requests[work.id] = request
        alone = work.attack is not None
        key = work.id if alone else (work.method, work.views)
        self._scheduler.add(Item(work, key, tokens, now, work.deadline))
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
        del self._requests[id]
        self._scheduler.remove(id)
        if self._pool.cancel(id):
            self._metrics.truncated.labels("cancelled").inc()

    def _settle(self, id: str, outcome: Answer | ServiceError) -> None:
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
        for item in (*self._scheduler.expire(now), *self._pool.expire(now)):
            self._settle(item.work.id, DeadlineExceeded("The deadline passed in the queue."))
        while self._pool.free:
            if batch := self._scheduler.next_batch(now):
                self._pool.run(batch)
            elif items := self._pool.recall():
                self._scheduler.put_back(items)
            else:
                break
        # Only what is full goes ahead: other batches may still grow until a worker is free.
        while self._pool.ahead and (batch := self._scheduler.full_batch()):
            self._pool.run(batch)
        if self._timer:
            self._timer.cancel()
        wakes = (self._scheduler.wake_at(self._pool.free), self._pool.wake_at())
        wake = min((instant for instant in wakes if instant is not None), default=None)
        if wake is not None:
            delay = max(0.0, wake - now)
            self._timer = asyncio.get_running_loop().call_later(delay, self._pump)

    def on_begin(self, items: list[Item]) -> None:
        now = self._clock()
        for item in items:
            permit = self._requests[item.work.id].permit
            permit.waited = now - item.enqueued
            permit.release()
            if item.attempts == 0:
                self._metrics.queue_seconds.observe(now - permit.since)

    def on_result(self, item: Item, result: Answer | Failure) -> None:
        if not _makes_sense(item.work, result):
            result = Failure("internal", "The worker's answer made no sense.")
        if isinstance(result, Answer):
            record_answer(self._metrics, item.work, result)
            self._settle(item.work.id, result)
        else:
            error = ERRORS.get(result.error_type, InternalError)
            self._settle(item.work.id, error(result.message))

    def on_progress(self, item: Item, event: ProgressEvent) -> None:
        if request := self._requests.get(item.work.id):
            request.watch(event)

    def on_lost(self, running: list[Item], waiting: list[Item]) -> None:
        """Try each that ran once more, alone: the one that killed the worker takes no other with
        it. What was not begun is as it was."""
        again = []
        for item in running:
            if item.attempts == 0:
                again.append(replace(item, key=item.work.id, attempts=1))
            else:
                why = "The worker was lost, and so was the next one."
                self._settle(item.work.id, NotReady(why, retry_after=_jitter(RECOVERY)))
        self._scheduler.put_back([*again, *waiting])

    def on_event(self) -> None:
        if model := self._pool.model:
            budget = self._settings.max_batch_tokens or model.max_batch_tokens
            self._scheduler.max_batch_tokens = budget
        if not self.alive:
            self._fail_all("No worker can be started.")
        self._pump()

    def _on_slots(self) -> None:
        self._metrics.queue_depth.set(len(self._permits))
        if self._draining and not self._permits and not self._requests:
            self._drained.set()


def _makes_sense(work: Task, result: object) -> bool:
    """Whether a result has the shape that it should have, whatever became of the worker."""
    if not isinstance(result, Answer):
        return isinstance(result, Failure)
    return all(
        len(scores) == len(work.labels) and all(-1e-3 < score < 1.001 for score in scores)
        for scores in (result.scores, result.undefended_scores)
    )


def _jitter(seconds: float) -> float:
    """At least 1 s, and spread: clients refused together should not return together."""
    return max(1.0, seconds * random.uniform(0.8, 1.2))
