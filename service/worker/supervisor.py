"""A worker as the engine meets it, and the supervision that keeps a process behind it."""

import asyncio
import atexit
import contextlib
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from service.messages import Beat, Cancel, Fatal, Ready, Run, Task
from service.settings import Settings
from service.worker.process import LEAVE, Message, Process

BEATS = 10  # in `silence`: a process that misses so many in a row is killed
START_PATIENCE = 12  # times as many before the first Ready, as loading may hold the interpreter
MIN_STALL = 30.0  # seconds without progress that are always allowed
MAX_FAILED_STARTS = 5  # in a row, before giving up
MAX_BACKOFF = 30.0  # seconds
STEADY = 60.0  # seconds of life after which the backoff begins anew

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Lost:
    """The worker is gone, and what it ran with it. Another follows unless `restarting` is False."""

    reason: str
    restarting: bool


Event = Message | Lost


class Backend(Protocol):
    """What the engine needs of a worker; the seam at which tests put a fake one."""

    def start(self, deliver: Callable[[Event], None]) -> None:
        """Begin to start up; `deliver` is called on the running event loop with every event."""

    def run(self, batch: list[Task]) -> None:
        """Work on a batch, after the one before it. Settled follows for each request that was not
        cancelled before, then Finished; or else Lost."""

    def cancel(self, ids: frozenset[str]) -> None:
        """Nobody waits for these any more; unknown ids are ignored."""

    async def stop(self) -> None:
        """End the worker; nothing is delivered afterwards."""


class WorkerProcess:
    """A Backend in a process of its own, started again when it dies, is silent for `silence`
    seconds, or makes no progress; after `backoff` seconds, doubling up to MAX_BACKOFF.

    `runner` is the dotted path of the Runner class that works inside.
    """

    def __init__(
        self,
        settings: Settings,
        index: int,
        *,
        runner: str = "service.worker.runner:Runner",
        silence: float = 10.0,
        backoff: float = 0.5,
    ) -> None:
        self._settings = settings
        self._index = index
        self._runner = runner
        self._beat = silence / BEATS
        # Nobody waits for a batch longer than the timeout; a step that is merely slow gets twice.
        self._max_stall = max(MIN_STALL, 2 * settings.request_timeout_ms / 1000)
        self._backoff = backoff
        self._stopping = threading.Event()
        self._supervisor = threading.Thread(target=self._supervise, daemon=True)
        self._process: Process | None = None  # set by the supervisor
        self._ready: Process | None = None  # set on the event loop, in step with what it delivers
        self._missed_beats = 0

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    def start(self, deliver: Callable[[Event], None]) -> None:
        self._deliver = deliver
        self._loop = asyncio.get_running_loop()
        self._watcher = self._loop.create_task(self._watch())
        # multiprocessing waits for its children at exit, and ours would wait for us.
        atexit.register(self._kill)
        self._supervisor.start()

    def run(self, batch: list[Task]) -> None:
        if self._ready:
            self._ready.send(Run(batch))

    def cancel(self, ids: frozenset[str]) -> None:
        if self._ready:
            self._ready.send(Cancel(ids))

    async def stop(self) -> None:
        self._stopping.set()
        self._watcher.cancel()
        if self._process:
            self._process.close()
        await asyncio.to_thread(self._supervisor.join, LEAVE)
        self._kill()
        await asyncio.to_thread(self._supervisor.join)
        atexit.unregister(self._kill)

    def _kill(self) -> None:
        self._stopping.set()
        if self._process:
            self._process.kill()

    async def _watch(self) -> None:
        """Kill a silent process. Our own ticks are counted and not the seconds: when the whole
        machine paused, the worker is not to blame."""
        while True:
            await asyncio.sleep(self._beat)
            self._missed_beats += 1
            patience = BEATS if self._ready else BEATS * START_PATIENCE
            if self._process and self._missed_beats > patience:
                log.error("worker %d is silent and is killed", self._index)
                self._process.kill()

    def _supervise(self) -> None:
        """The supervisor thread: one process after the other."""
        failed_starts, delay = 0, self._backoff
        while not self._stopping.is_set():
            began = time.monotonic()
            last, reason = self._live()
            if last is Fatal or self._stopping.is_set():
                return
            failed_starts = 0 if last is Ready else failed_starts + 1
            if time.monotonic() - began > STEADY:
                delay = self._backoff
            restarting = failed_starts < MAX_FAILED_STARTS
            log.error("worker %d was lost: %s", self._index, reason)
            self._post(Lost(reason, restarting), None)
            if not restarting:
                return
            self._stopping.wait(delay)
            delay = min(2 * delay, MAX_BACKOFF)

    def _live(self) -> tuple[type[Ready] | type[Fatal] | None, str]:
        """One process from start to end: how far it came, and why it ended."""
        reached: type[Ready] | type[Fatal] | None = None
        self._missed_beats = 0
        try:
            process = Process(self._settings, self._index, self._runner, self._beat)
        except Exception as error:
            return reached, f"no process: {error}"
        self._process = process
        if self._stopping.is_set():
            process.close()
        for message in process.messages():
            self._missed_beats = 0
            if isinstance(message, Ready | Fatal):
                reached = type(message)
            elif isinstance(message, Beat) and message.stalled_seconds > self._max_stall:
                log.error("worker %d makes no progress and is killed", self._index)
                process.kill()
            self._post(message, process)
        return reached, f"exit code {process.end()}"

    def _post(self, event: Event, process: Process | None) -> None:
        # At the end of the API process the loop may be closed already.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._on_event, event, process)

    def _on_event(self, event: Event, process: Process | None) -> None:
        """On the event loop. A batch goes to the process whose Ready was delivered and whose Lost
        was not, so a message for one process can never reach the next."""
        if self._stopping.is_set():
            return
        if isinstance(event, Ready):
            self._ready = process
        elif isinstance(event, Lost):
            self._ready = None
        self._deliver(event)
