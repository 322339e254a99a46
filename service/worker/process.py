"""One worker process and its pipes, seen from both ends: `Process` outside, `main` inside.

One pipe each way, each end used by one thread, so that an end of file is the news that the other
side is gone. A queue of multiprocessing would keep its locks when a process is killed.
"""

import contextlib
import importlib
import logging
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Protocol

from service.errors import ModelError
from service.messages import (
    Answer,
    Beat,
    Cancel,
    Failure,
    Fatal,
    Finished,
    Progress,
    ProgressEvent,
    Ready,
    Run,
    Settled,
    Task,
)
from service.settings import Settings
from service.telemetry import logs

LEAVE = 5.0  # seconds a process gets to end by itself

log = logging.getLogger(__name__)
spawn = multiprocessing.get_context("spawn")

Message = Ready | Beat | Progress | Settled | Finished | Fatal


class Runner(Protocol):
    """What runs the batches in the process. Built with (settings, index), it loads the model and
    warms up, or raises ModelError. `progress` is the instant of its last step boundary."""

    ready: Ready
    progress: float

    def memory_bytes(self) -> int:
        """Device memory in use."""

    def run(
        self,
        batch: list[Task],
        settle: Callable[[str, Answer | Failure | ProgressEvent], None],
        cancelled: Callable[[str], bool],
    ) -> dict[str, int]:
        """Settle every request, each once, early where possible; return counters to add.

        Glimpses of a request may go before its result."""


class Process:
    """The API's handle on one process, from its start to its end.

    `runner` is the dotted path of a Runner class, `beat` the seconds between signs of life.
    """

    def __init__(self, settings: Settings, index: int, runner: str, beat: float) -> None:
        inbox, self._to_child = spawn.Pipe(duplex=False)
        self._from_child, outbox = spawn.Pipe(duplex=False)
        self._outbox: SimpleQueue[Run | Cancel | None] = SimpleQueue()
        self._process = spawn.Process(
            target=main, args=(settings, index, runner, beat, inbox, outbox), name=f"worker-{index}"
        )
        self._process.start()
        # Only the child may hold its ends, or the end of file would never come.
        inbox.close()
        outbox.close()
        self._sender = threading.Thread(target=self._send_all, daemon=True)
        self._sender.start()

    @property
    def pid(self) -> int | None:
        return self._process.pid

    def send(self, message: Run | Cancel) -> None:
        """Queue a message; never blocks. To a process that is gone it comes to nothing."""
        self._outbox.put(message)

    def close(self) -> None:
        """Ask the process to end, by the end of file."""
        self._outbox.put(None)

    def kill(self) -> None:
        self._process.kill()

    def messages(self) -> Iterator[Message]:
        """Everything the process says, until it is gone."""
        with contextlib.suppress(Exception):  # a broken message is as good as a broken pipe
            while True:
                yield self._from_child.recv()

    def end(self) -> int | None:
        """See to it that the process is gone; its exit code, negative for a signal."""
        self.close()
        self._process.join(LEAVE)
        self._process.kill()
        self._process.join()
        self._sender.join()
        self._from_child.close()
        return self._process.exitcode

    def _send_all(self) -> None:
        """In order, and off the event loop: the pipe blocks while large images go through."""
        with contextlib.suppress(OSError), self._to_child:
            while message := self._outbox.get():
                self._to_child.send(message)


def main(
    settings: Settings,
    index: int,
    runner_path: str,
    beat: float,
    inbox: "Connection[Run | Cancel]",
    outbox: "Connection[Message]",
) -> None:
    """The inside: load, then run batch after batch until the pipe ends."""
    # A Ctrl-C or a SIGTERM to the group is for the API process, which still drains through us.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    logs.configure(settings.log_format)
    prepare_torch(settings.workers)
    inside = _Inside(inbox, outbox)
    threading.Thread(target=inside.receive, daemon=True).start()
    threading.Thread(target=inside.beat, args=(beat,), daemon=True).start()
    module, _, name = runner_path.partition(":")
    try:
        runner: Runner = getattr(importlib.import_module(module), name)(settings, index)
    except ModelError as error:
        inside.send(Fatal(str(error)))
        return
    inside.work(runner)


def prepare_torch(workers: int = 1) -> None:
    """Tell torch how to behave, before its import: the cores (`OMP_NUM_THREADS` where it is set,
    else those that this process may use) are divided among the workers, its threads wait for each
    other only briefly before they sleep, and on a GPU it compiles nothing.

    By default every worker takes all cores, and threads spin while they wait, so that where
    anything else wants a core each step takes many times as long; threads that never spin cost an
    idle machine a good part of its speed. For a few products on a GPU torch would build kernels of
    its own at run time, for which the image has no compiler.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    os.environ.setdefault("TORCH_DISABLE_NATIVE_JIT", "1")
    if workers > 1:
        given = os.environ.get("OMP_NUM_THREADS", "")
        cores = int(given) if given.isdecimal() else count_cores()
        os.environ["OMP_NUM_THREADS"] = str(max(1, cores // workers))


def count_cores() -> int:
    """How many this process may use, where the system tells; else how many there are."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class _Inside:
    """Three threads: one receives, one beats, the main one works."""

    def __init__(self, inbox: "Connection[Run | Cancel]", outbox: "Connection[Message]") -> None:
        self._inbox = inbox
        self._outbox = outbox
        self._lock = threading.Lock()
        self._batches: SimpleQueue[list[Task]] = SimpleQueue()
        self._unfinished: set[str] = set()
        self._cancelled: set[str] = set()
        self._runner: Runner | None = None
        self._began: float | None = None

    def send(self, message: Message) -> None:
        try:
            with self._lock:
                self._outbox.send(message)
        except OSError:
            os._exit(0)

    def receive(self) -> None:
        try:
            while True:
                match self._inbox.recv():
                    case Run(batch=batch):
                        self._unfinished |= {work.id for work in batch}
                        self._batches.put(batch)
                    case Cancel(ids=ids):
                        self._cancelled |= ids & self._unfinished
        except (EOFError, OSError):
            # The API process closed the pipe or is gone; whatever runs here is for nobody.
            os._exit(0)

    def beat(self, seconds: float) -> None:
        while True:
            runner, began = self._runner, self._began
            stalled = time.monotonic() - max(began, runner.progress) if runner and began else 0.0
            self.send(Beat(stalled, runner.memory_bytes() if runner else 0))
            time.sleep(seconds)

    def work(self, runner: Runner) -> None:
        self._runner = runner
        self.send(runner.ready)
        while True:
            batch = self._batches.get()
            self._began = time.monotonic()
            wanted = [work for work in batch if work.id not in self._cancelled]
            counts = self._run(runner, wanted) if wanted else {}
            self._began = None
            self._unfinished -= {work.id for work in batch}
            self._cancelled &= self._unfinished
            self.send(Finished(counts))

    def _run(self, runner: Runner, batch: list[Task]) -> dict[str, int]:
        unsettled = {work.id for work in batch}

        def settle(id: str, result: Answer | Failure | ProgressEvent) -> None:
            if isinstance(result, ProgressEvent):
                self.send(Progress(id, result))
            elif id in unsettled:
                unsettled.remove(id)
                self.send(Settled(id, result))

        try:
            return runner.run(batch, settle, self._cancelled.__contains__)
        except Exception:
            log.exception("the runner raised")
            return {}
        finally:
            for id in list(unsettled):
                settle(id, Failure("internal", "The request could not be worked on."))
