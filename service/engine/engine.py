"""From an admitted request to its answer.

A request reserves a permit, claims its price, is decoded and then submitted. It settles exactly
once: with an answer or an error, at its deadline, when it is cancelled, or at shutdown. Everything
here runs on the event loop; the workers are other processes.
"""

import asyncio
import itertools
import time
from collections.abc import AsyncGenerator, Callable, Hashable, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, field, replace
from typing import Any

from service.engine.label_sets import LabelSets
from service.engine.permits import Permit, Permits, count_ahead
from service.engine.price import count_tokens, price, price_class
from service.engine.retry_after import RetryAfter, jitter
from service.engine.scheduler import Item, Scheduler
from service.engine.worker_pool import WorkerPool
from service.errors import DeadlineExceeded, NotReady, QueueFull, ServiceError, make_error
from service.messages import Answer, Failure, ProgressEvent, Ready, Task, Truncation
from service.settings import Settings
from service.telemetry.metrics import Metrics
from service.telemetry.traces import trace_answer
from service.worker.supervisor import Backend

GRACE = 5.0  # seconds after its deadline for which a running request is still waited for
RECOVERY = 5.0  # seconds in which a lost worker is usually replaced
QUEUE_SHARE = 0.5
"""Share of the timeout that one caller's requests may be expected to take together. The rest is for
a caller that comes later and takes turns, and for estimates that are too low."""

_Event = ProgressEvent | Answer | ServiceError


@dataclass(slots=True, eq=False)
class _Request:
    """A request that waits for its result, the last of its events, unless `truncation` ends it."""

    permit: Permit
    truncation: Truncation = "cancelled"
    events: asyncio.Queue[_Event] = field(default_factory=asyncio.Queue)
    settled: bool = False


class Engine:
    """Queues requests, gives them to the workers in batches, and settles every one."""

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
        self._permits = Permits(
            settings.max_queue_size, settings.max_body_bytes, self._on_permits_changed
        )
        self._retry_after = RetryAfter()
        self._label_sets = LabelSets()
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
        """Whether requests are served now."""
        return self._pool.ready > 0 and not self._draining

    @property
    def model(self) -> Ready | None:
        """The model's facts, once a worker has been ready."""
        return self._pool.model

    @property
    def alive(self) -> bool:
        """False once no worker can be started."""
        return self.fatal is None

    @property
    def fatal(self) -> str | None:
        """Why no worker can be started, in one sentence."""
        return self._pool.fatal

    @property
    def info(self) -> dict[str, Any]:
        """The model and the workers, as in `/info`."""
        return self._pool.info

    @property
    def queue_depth(self) -> int:
        """Requests that are being decoded or wait for their batch to begin."""
        return len(self._permits)

    async def start(self) -> None:
        """Start the workers. `ready` becomes true when the first has loaded its model."""
        self._pool.start()

    def drain(self) -> None:
        """Refuse new requests and finish the admitted ones."""
        self._draining = True
        self._on_permits_changed()

    async def stop(self, drain_timeout: float) -> None:
        """Drain for at most `drain_timeout` seconds, fail the rest, stop the workers."""
        if self._stopped:
            return
        self.drain()
        with suppress(TimeoutError):
            await asyncio.wait_for(self._drained.wait(), drain_timeout)
        self._stopped = True
        self._fail_all("The server is shutting down.")
        await self._pool.stop()

    def reserve(self, size_bytes: int, caller: str = "") -> Permit:
        """Take a permit for a file of `size_bytes`, before anything of it is parsed.

        It must be released. Raises QueueFull or NotReady, with `retry_after`.
        """
        refusal: ServiceError
        if self._draining:
            reason = "draining"
            refusal = NotReady("The server is shutting down.", retry_after=jitter(RECOVERY))
        elif not self.ready:
            reason = "not_ready"
            refusal = NotReady("The server is not ready.", retry_after=jitter(RECOVERY))
        elif permit := self._permits.take(size_bytes, self._clock(), self._limit(), caller):
            if 2 * len(self._permits) <= self._settings.max_queue_size:
                self._retry_after.clear(caller)
            return permit
        else:
            interval = self._pool.seconds_per_request / self._pool.ready
            # Retry-After has whole seconds, so at most as many may share one as the queue holds.
            interval = max(interval, 1 / self._settings.max_queue_size)
            wait = self._seconds(sum(permit.price for permit in self._unfinished()))
            raise self._queue_full(caller, wait, interval)
        self._metrics.rejected.labels(reason).inc()
        raise refusal

    def claim(self, permit: Permit, task: Task) -> float:
        """Price a task, relative to a typical request, and check that its turn comes in time.

        Raises QueueFull if it is expected to take longer than QUEUE_SHARE of `request_timeout_ms`,
        or than all of that if none of its caller's is ahead. With nothing ahead it never does.
        """
        assert self._pool.model is not None  # or there were no permit
        cost = price(task, self._pool.model, self._settings, encoded=task in self._label_sets)
        own, turns, callers = count_ahead(permit.caller, cost, self._unfinished() - {permit})
        seconds = self._seconds(own + turns + cost)
        limit = self._settings.request_timeout_ms / 1000 * (QUEUE_SHARE if own else 1.0)
        group = permit.caller, price_class(cost)
        if own + turns > 0 and seconds > limit:
            raise self._queue_full(group, seconds - limit, self._seconds(cost * callers))
        if 2 * seconds <= limit:
            self._retry_after.clear(group)
        permit.price, permit.priced = cost, True
        self._on_permits_changed()
        return cost

    def _unfinished(self) -> set[Permit]:
        """The permits of requests that wait or run."""
        return {*self._permits.held, *(r.permit for r in self._requests.values() if not r.settled)}

    def _seconds(self, work: float) -> float:
        """The expected time for requests whose prices sum to `work`."""
        return work * self._pool.seconds_per_price / max(1, self._pool.ready)

    def _queue_full(self, group: Hashable, wait: float, interval: float) -> QueueFull:
        self._metrics.rejected.labels("queue_full").inc()
        seconds = self._retry_after.assign(group, self._clock(), wait, interval)
        return QueueFull("The queue is full.", retry_after=max(1.0, seconds))

    def _limit(self) -> int:
        """How many requests may wait now.

        Running requests count too, because new ones wait for them as well. But one batch for each
        worker may always wait.
        """
        size = self._settings.max_queue_size
        next_batches = self._pool.ready * self._settings.max_batch_size
        return max(size - self._pool.running, min(size, next_batches))

    async def submit(self, permit: Permit, task: Task) -> Answer:
        """Answer one task. Cancelling the caller withdraws it.

        Raises DeadlineExceeded, NotReady, or the error that the worker reported; and QueueFull if
        the price was not claimed before.
        """
        try:
            async with aclosing(self.stream(permit, task)) as events:
                (answer,) = [event async for event in events if isinstance(event, Answer)]
        except DeadlineExceeded:
            if task.own_deadline:
                self._metrics.rejected.labels("client_deadline").inc()
            raise
        return answer

    async def stream(
        self, permit: Permit, task: Task
    ) -> AsyncGenerator[ProgressEvent | Answer, None]:
        """Like `submit`, with the progress of an attack before the answer."""
        model = self._pool.model
        if self._stopped or not self.alive or model is None:
            raise NotReady("The server is not ready.", retry_after=jitter(RECOVERY))
        # Clients choose request ids, so two may be equal.
        queued = replace(task, id=f"{task.id}/{next(self._serial)}")
        tokens = count_tokens(task, model, self._settings)
        if task.attack or not permit.priced:
            self.claim(permit, task)
        shared = task.method, task.views, price_class(permit.price)
        key: Hashable = shared if task.attack is None else queued.id
        request = self._requests[queued.id] = _Request(permit)
        enqueued = self._clock()
        item = Item(queued, key, tokens, enqueued, caller=permit.caller, price=permit.price)
        self._scheduler.add(item)
        try:
            self._pump()
            while True:
                event = await self._next_event(request, task)
                if isinstance(event, ServiceError):
                    raise event
                if isinstance(event, Answer):
                    trace_answer(task, event, enqueued, permit.waited)
                yield event
                if isinstance(event, Answer):
                    return
        finally:
            self._withdraw(queued.id)

    async def _next_event(self, request: _Request, task: Task) -> _Event:
        try:
            async with asyncio.timeout(task.deadline + GRACE - self._clock()):
                return await request.events.get()
        except TimeoutError:
            request.truncation = "deadline"
            return DeadlineExceeded("The worker did not answer before the deadline.")

    def _withdraw(self, id: str) -> None:
        """Forget a request that has its result or that nobody waits for."""
        request = self._requests.pop(id)
        self._scheduler.remove(id)
        if self._pool.cancel(id):
            self._metrics.truncated.labels(request.truncation).inc()

    def _settle(self, id: str, result: Answer | ServiceError) -> None:
        request = self._requests.get(id)
        if request and not request.settled:
            request.settled = True
            request.events.put_nowait(result)

    def _fail_all(self, message: str) -> None:
        for id in self._requests:
            self._scheduler.remove(id)
            self._settle(id, NotReady(message, retry_after=jitter(RECOVERY)))

    def _pump(self) -> None:
        """Do what is due now, and set a timer for what will be."""
        now = self._clock()
        for item in (*self._scheduler.expire(now), *self._pool.expire(now)):
            self._settle(item.task.id, DeadlineExceeded("The deadline passed in the queue."))
        while self._pool.free:
            if batch := self._scheduler.next_batch(now):
                self._pool.run(batch)
            elif items := self._pool.recall():
                self._scheduler.put_back(items)
            else:
                break
        # Only full batches are sent ahead; others may still grow until a worker is free.
        while self._pool.accepts and (batch := self._scheduler.full_batch()):
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
            permit = self._requests[item.task.id].permit
            permit.waited = now - item.enqueued
            permit.release()
            if item.attempts == 0:
                self._metrics.queue_seconds.observe(now - permit.since)

    def on_result(self, item: Item, result: Answer | Failure) -> None:
        if not _is_valid(item.task, result):
            result = Failure("internal", "The worker's answer was invalid.")
        if isinstance(result, Answer):
            self._label_sets.add(item.task)
            self._metrics.observe_answer(item.task, result)
            self._settle(item.task.id, result)
        else:
            self._settle(item.task.id, make_error(result.error_type, result.message))

    def on_progress(self, item: Item, event: ProgressEvent) -> None:
        if request := self._requests.get(item.task.id):
            request.events.put_nowait(event)

    def on_lost(self, running: list[Item], waiting: list[Item]) -> None:
        """Retry each running item once, alone, so that the one that killed the worker cannot take
        others with it. Items of a batch that had not begun are queued again as they were."""
        self._label_sets.clear()
        again = []
        for item in running:
            if item.attempts == 0:
                again.append(replace(item, key=item.task.id, attempts=1))
            else:
                message = "The worker was lost, and so was the next one."
                self._settle(item.task.id, NotReady(message, retry_after=jitter(RECOVERY)))
        self._scheduler.put_back([*again, *waiting])

    def on_event(self) -> None:
        if budget := self._settings.max_batch_tokens or self._pool.max_batch_tokens:
            self._scheduler.max_batch_tokens = budget
        if not self.alive:
            self._fail_all("No worker can be started.")
        self._pump()

    def _on_permits_changed(self) -> None:
        self._metrics.queue_depth.set(len(self._permits))
        expected = self._seconds(sum(permit.price for permit in self._permits.held))
        self._metrics.queue_seconds_expected.set(expected)
        if self._draining and not self._permits and not self._requests:
            self._drained.set()


def _is_valid(task: Task, result: object) -> bool:
    """Whether a result has the right shape, even from a worker that misbehaves."""
    if not isinstance(result, Answer):
        return isinstance(result, Failure)
    return all(
        len(scores) == len(task.labels) and all(-1e-3 < score < 1.001 for score in scores)
        for scores in (result.scores, result.undefended_scores)
    )
