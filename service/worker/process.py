"""One worker process and its pipes: `Process` in the API process, `main` in the worker.

There is one pipe each way, and each end is used by one thread, so an end of file tells that the
other side is gone. A multiprocessing queue would leave its locks held when a process is killed.
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
from service.malloc import trim_regularly
from service.messages import (
    Answer,
    Cancel,
    Failure,
    Fatal,
    Finished,
    Heartbeat,
    Progress,
    ProgressEvent,
    Ready,
    Run,
    Settled,
    Task,
)
from service.settings import Settings
from service.telemetry import logs
from service.worker import pipe

EXIT_TIMEOUT = 5.0  # seconds for a process to exit by itself

log = logging.getLogger(__name__)
spawn = multiprocessing.get_context("spawn")

Message = Ready | Heartbeat | Progress | Settled | Finished | Fatal


class Runner(Protocol):
    """Runs the batches in the worker.

    The constructor takes (settings, index), loads the model and warms it up, or raises ModelError.
    `progress` is the instant of the last progress of a batch.
    """

    ready: Ready
    progress: float

    def memory_bytes(self) -> int:
        """Device memory in use, in bytes."""

    def run(
        self,
        batch: list[Task],
        settle: Callable[[str, Answer | Failure | ProgressEvent], None],
        cancelled: Callable[[str], bool],
    ) -> dict[str, int]:
        """Settle every task once, as soon as possible; return the counts for `Finished`.

        The ProgressEvents of an attack precede its result.
        """


class Process:
    """One worker process, seen from the API process.

    `runner` is the dotted path of a Runner class, `beat` the seconds between heartbeats.
    """

    def __init__(self, settings: Settings, index: int, runner: str, beat: float) -> None:
        inbox, self._to_child = spawn.Pipe(duplex=False)
        pipe.widen(self._to_child)
        self._from_child, outbox = spawn.Pipe(duplex=False)
        self._outbox: SimpleQueue[Run | Cancel | None] = SimpleQueue()
        self._process = spawn.Process(
            target=main, args=(settings, index, runner, beat, inbox, outbox), name=f"worker-{index}"
        )
        self._process.start()
        # The child must hold the only copies of its ends, or there would be no end of file.
        inbox.close()
        outbox.close()
        self._sender = threading.Thread(target=self._send_all, daemon=True)
        self._sender.start()

    @property
    def pid(self) -> int | None:
        return self._process.pid

    def send(self, message: Run | Cancel) -> None:
        """Queue a message without blocking. Messages to a process that is gone are dropped."""
        self._outbox.put(message)

    def close(self) -> None:
        """Ask the process to exit, by an end of file."""
        self._outbox.put(None)

    def kill(self) -> None:
        self._process.kill()

    def messages(self) -> Iterator[Message]:
        """All messages of the process, until it is gone."""
        with contextlib.suppress(Exception):  # treat a broken message like a broken pipe
            while True:
                yield pipe.receive(self._from_child)

    def end(self) -> int | None:
        """Make sure that the process is gone; its exit code, negative for a signal."""
        self.close()
        self._process.join(EXIT_TIMEOUT)
        self._process.kill()
        self._process.join()
        self._sender.join()
        self._from_child.close()
        return self._process.exitcode

    def _send_all(self) -> None:
        """Send in order, in a thread: the pipe blocks while it carries large images."""
        with contextlib.suppress(OSError), self._to_child:
            while message := self._outbox.get():
                pipe.send(self._to_child, message)


def main(
    settings: Settings,
    index: int,
    runner_path: str,
    beat: float,
    inbox: "Connection[Run | Cancel]",
    outbox: "Connection[Message]",
) -> None:
    """The worker: load the model, then run batches until the pipe is closed."""
    # A Ctrl-C or SIGTERM to the process group is for the API process, which drains this one first.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    logs.configure(settings.log_format)
    prepare_torch(settings.workers)
    trim_regularly()
    worker = _Worker(inbox, outbox)
    threading.Thread(target=worker.receive, daemon=True).start()
    threading.Thread(target=worker.beat, args=(beat,), daemon=True).start()
    module, _, name = runner_path.partition(":")
    try:
        runner: Runner = getattr(importlib.import_module(module), name)(settings, index)
    except ModelError as error:
        worker.send(Fatal(str(error)))
        return
    worker.run_batches(runner)


def prepare_torch(workers: int = 1) -> None:
    """Set the environment variables that torch reads when it is imported.

    The cores (`OMP_NUM_THREADS` if it is set, else those that this process may use) are divided
    among the workers; by default every worker would use all of them. Threads spin only briefly
    while they wait: with the default, a step takes many times as long if anything else needs a
    core, and without any spinning an idle machine is noticeably slower. On a GPU torch compiles no
    kernels at run time, because the image has no compiler.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    os.environ.setdefault("TORCH_DISABLE_NATIVE_JIT", "1")
    if workers > 1:
        given = os.environ.get("OMP_NUM_THREADS", "")
        cores = int(given) if given.isdecimal() else count_cores()
        os.environ["OMP_NUM_THREADS"] = str(max(1, cores // workers))


def count_cores() -> int:
    """How many cores this process may use; if the system does not tell, how many there are."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class _Worker:
    """Three threads: one receives, one sends heartbeats, the main one runs batches."""

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
                pipe.send(self._outbox, message)
        except OSError:
            os._exit(0)

    def receive(self) -> None:
        try:
            while True:
                match pipe.receive(self._inbox):
                    case Run(batch=batch):
                        self._unfinished |= {task.id for task in batch}
                        self._batches.put(batch)
                    case Cancel(ids=ids):
                        self._cancelled |= ids & self._unfinished
        except (EOFError, OSError):
            # The API process closed the pipe or is gone, so nobody waits for what runs here.
            os._exit(0)

    def beat(self, seconds: float) -> None:
        while True:
            runner, began = self._runner, self._began
            stalled = time.monotonic() - max(began, runner.progress) if runner and began else 0.0
            self.send(Heartbeat(stalled, runner.memory_bytes() if runner else 0))
            time.sleep(seconds)

    def run_batches(self, runner: Runner) -> None:
        self._runner = runner
        self.send(runner.ready)
        while True:
            batch = self._batches.get()
            self._began = time.monotonic()
            wanted = [task for task in batch if task.id not in self._cancelled]
            counts = self._run(runner, wanted) if wanted else {}
            self._began = None
            self._unfinished -= {task.id for task in batch}
            self._cancelled &= self._unfinished
            self.send(Finished(counts))

    def _run(self, runner: Runner, batch: list[Task]) -> dict[str, int]:
        unsettled = {task.id for task in batch}

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
                settle(id, Failure("internal", "The request could not be processed."))
