"""The interface of a worker, and its implementation as a supervised process."""

import asyncio
import atexit
import contextlib
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from service.messages import Cancel, Fatal, Heartbeat, Ready, Run, Task
from service.settings import Settings
from service.worker.process import EXIT_TIMEOUT, Message, Process

BEATS = 10  # heartbeats that a process may miss in a row, `silence` seconds, before it is killed
START_FACTOR = 12  # times as many before the first Ready: loading may hold the interpreter lock
MIN_STALL = 30.0  # seconds without progress that are allowed at least
MAX_FAILED_STARTS = 5  # in a row, before a worker counts as exhausted
MAX_BACKOFF = 30.0  # seconds
STEADY = 60.0  # seconds of uptime after which the backoff is reset

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Lost:
    """The worker is gone, with its batches, and is started again after a while. `exhausted`: its
    last MAX_FAILED_STARTS starts or more have failed."""

    reason: str
    exhausted: bool = False


Event = Message | Lost


class Backend(Protocol):
    """What the engine needs of a worker. Tests pass a fake one."""

    def start(self, deliver: Callable[[Event], None]) -> None:
        """Begin to start. `deliver` is called with every event, on the running event loop."""

    def run(self, batch: list[Task]) -> None:
        """Run a batch after the one before it. Settled follows for each task that was not
        cancelled, then Finished; or else Lost."""

    def cancel(self, ids: frozenset[str]) -> None:
        """Drop these tasks. Unknown ids are ignored."""

    async def stop(self) -> None:
        """Stop the worker; nothing is delivered afterwards."""


class WorkerProcess:
    """A Backend in a process of its own.

    The process is restarted when it dies, cannot load its model, sends no heartbeat for `silence`
    seconds, or makes no progress. The first restart waits for `backoff` seconds, and each further
    one twice as long, up to MAX_BACKOFF. Restarts go on until `stop`. `runner` is the dotted path
    of the Runner class inside.
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
        # Nobody waits for a batch longer than the timeout; twice that leaves room for a slow step.
        self._max_stall = max(MIN_STALL, 2 * settings.request_timeout_ms / 1000)
        self._backoff = backoff
        self._stopping = threading.Event()
        self._supervisor = threading.Thread(target=self._supervise, daemon=True)
        # Set by the supervisor's thread, None while there is none: others read it once and keep it.
        self._process: Process | None = None
        self._ready: Process | None = None  # set on the event loop, in the order of delivery
        self._missed_beats = 0

    @property
    def pid(self) -> int | None:
        process = self._process
        return process.pid if process else None

    def start(self, deliver: Callable[[Event], None]) -> None:
        self._deliver = deliver
        self._loop = asyncio.get_running_loop()
        self._watcher = self._loop.create_task(self._watch())
        # At exit multiprocessing waits for its children, which would wait for this process.
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
        if process := self._process:
            process.close()
        await asyncio.to_thread(self._supervisor.join, EXIT_TIMEOUT)
        self._kill()
        await asyncio.to_thread(self._supervisor.join)
        atexit.unregister(self._kill)

    def _kill(self) -> None:
        self._stopping.set()
        if process := self._process:
            process.kill()

    async def _watch(self) -> None:
        """Kill a silent process. This counts ticks of this loop and not seconds, so that a pause of
        the whole machine is not held against the worker."""
        while True:
            await asyncio.sleep(self._beat)
            self._missed_beats += 1
            allowed = BEATS if self._ready else BEATS * START_FACTOR
            if (process := self._process) and self._missed_beats > allowed:
                log.error("worker %d sent no heartbeat; killing it", self._index)
                process.kill()

    def _supervise(self) -> None:
        """The supervisor thread: run one process after another."""
        failed_starts, delay = 0, self._backoff
        while not self._stopping.is_set():
            began = time.monotonic()
            try:
                process = Process(self._settings, self._index, self._runner, self._beat)
            except Exception as error:
                # The machine is short of descriptors, processes or memory, which passes. It is no
                # failed start: the worker was not begun.
                reason = f"no process can be started: {error}"
            else:
                ready, reason = self._run_process(process)
                if self._stopping.is_set():
                    return
                failed_starts = 0 if ready else failed_starts + 1
                if ready and time.monotonic() - began > STEADY:
                    delay = self._backoff
            self._post(Lost(reason, failed_starts >= MAX_FAILED_STARTS), None)
            self._stopping.wait(delay)
            delay = min(2 * delay, MAX_BACKOFF)

    def _run_process(self, process: Process) -> tuple[bool, str]:
        """Run one process to its end: whether it was ready, and why it ended."""
        ready, problem = False, ""
        self._missed_beats = 0
        self._process = process
        if self._stopping.is_set():
            process.close()
        for message in process.messages():
            self._missed_beats = 0
            if isinstance(message, Ready):
                ready = True
            elif isinstance(message, Fatal):
                problem = message.message
            elif isinstance(message, Heartbeat) and message.stalled_seconds > self._max_stall:
                log.error("worker %d makes no progress; killing it", self._index)
                process.kill()
            self._post(message, process)
        code = process.end()
        self._process = None  # the next one may be long in coming, and a dead one cannot be silent
        return ready, problem or f"exit code {code}"

    def _post(self, event: Event, process: Process | None) -> None:
        # When the API process exits, the loop may be closed already.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._on_event, event, process)

    def _on_event(self, event: Event, process: Process | None) -> None:
        """Deliver on the event loop. Batches go to the process whose Ready was delivered and whose
        Lost was not, so a message for one process cannot reach the next."""
        if self._stopping.is_set():
            return
        if isinstance(event, Ready):
            self._ready = process
        elif isinstance(event, Lost):
            self._ready = None
        self._deliver(event)
