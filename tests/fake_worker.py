"""Workers for tests: `FakeWorker` without a process, played from the test, and runners without a
model for real processes."""

import asyncio
import contextlib
import ctypes
import math
import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace

from service.errors import ModelError
from service.messages import Answer, Failure, Fatal, Finished, Heartbeat, Ready, Settled, Task
from service.settings import Settings
from service.worker.supervisor import Event, Lost

READY = Ready(
    info={"model": {"name": "fake"}}, max_batch_tokens=10_000, image_tokens=10, context_length=77
)


def answer(work: Task) -> Answer:
    """The first label wins, undefended too, unless it is 'attacked'."""
    first = [1.0] + [0.0] * (len(work.labels) - 1)
    return Answer(
        scores=first,
        undefended_scores=first[::-1] if work.labels[0] == "attacked" else first,
        design="vli",
        steps=work.steps,
        views=work.views,
        views_kept=max(1, work.views // 10),
        readout=work.readout,
        entropy_before=0.5,
        entropy_after=0.25,
        agreement=1.0,
        suspicion=0.0,
        suspected=False,
        truncated=None,
        labels_truncated=0,
        adapt_seconds=0.01,
        predict_seconds=0.01,
    )


class FakeWorker:
    """A Backend. By itself it is ready at once and answers each batch after `seconds(batch)`.

    With `automatic=False` the test calls `be_ready`, `settle`, `finish`, `die`; a silent worker
    is one that is told nothing. `batches` and `cancelled` record what the engine asked for.
    """

    def __init__(
        self,
        reply: Callable[[Task], Answer | Failure] = answer,
        seconds: Callable[[list[Task]], float] = lambda batch: 0.0,
        automatic: bool = True,
        ready: Ready = READY,
    ) -> None:
        self.reply = reply
        self.seconds = seconds
        self.automatic = automatic
        self.ready = ready
        self.batches: list[list[Task]] = []
        self.begun: list[list[Task]] = []  # those of them that were begun, but for the cancelled
        self._finished = 0  # of the batches, in their order
        self.cancelled: set[str] = set()
        self.stopped = False
        self.deliver: Callable[[Event], None] = lambda event: None
        self._timer: asyncio.TimerHandle | None = None

    def start(self, deliver: Callable[[Event], None]) -> None:
        self.deliver = deliver
        if self.automatic:
            asyncio.get_running_loop().call_soon(self.be_ready)

    @property
    def busy(self) -> bool:
        """Whether a batch is not finished."""
        return len(self.batches) > self._finished

    @property
    def running(self) -> list[Task]:
        """The first batch that is not finished."""
        return self.batches[self._finished]

    def run(self, batch: list[Task]) -> None:
        self.batches.append(batch)
        if self.automatic and self.running is batch:
            self._begin()

    def _begin(self) -> None:
        self.begun.append([work for work in self.running if work.id not in self.cancelled])
        seconds = self.seconds(self.running)
        self._timer = asyncio.get_running_loop().call_later(seconds, self.finish)

    def cancel(self, ids: frozenset[str]) -> None:
        self.cancelled |= ids

    async def stop(self) -> None:
        self._forget_batch()
        self.stopped = True

    def be_ready(self) -> None:
        self.deliver(self.ready)

    def beat(self, memory_bytes: int = 0) -> None:
        self.deliver(Heartbeat(0.0, memory_bytes))

    def settle(self, *works: Task) -> None:
        """Settle these, by default all of the batch that runs."""
        for work in works or self.running:
            self.deliver(Settled(work.id, self.reply(work)))

    def finish(self, **counts: int) -> None:
        """Settle all of the batch that runs, end it, and begin the next."""
        self.settle()
        self._finished += 1
        waits = self.busy
        self.deliver(Finished(counts))
        if self.automatic and waits:
            self._begin()

    def die(self, exhausted: bool = False) -> None:
        """Lose the batch; `be_ready` brings the next process up."""
        self._forget_batch()
        self.deliver(Lost("killed by the test", exhausted))

    def give_up(self, message: str) -> None:
        self.deliver(Fatal(message))

    def _forget_batch(self) -> None:
        if self._timer:
            self._timer.cancel()
        self._finished = len(self.batches)


class EchoRunner:
    """A Runner that takes 20 ms a request; the label `hang` hangs, `raise` raises."""

    def __init__(self, settings: Settings, index: int) -> None:
        self.ready = READY
        self.progress = 0.0  # long ago

    def memory_bytes(self) -> int:
        return 42

    def run(
        self,
        batch: list[Task],
        settle: Callable[[str, Answer | Failure], None],
        cancelled: Callable[[str], bool],
    ) -> dict[str, int]:
        for work in batch:
            if work.labels[0] == "raise":
                raise RuntimeError("raised in a test")
            until = time.monotonic() + (60.0 if work.labels[0] == "hang" else 0.02)
            while time.monotonic() < until and not cancelled(work.id):
                time.sleep(0.005)
        for work in batch:
            if cancelled(work.id):
                settle(work.id, Failure("client_gone", "Cancelled."))
            else:
                settle(work.id, answer(work))
        return {"text_cache_hits": len(batch)}


class FatalRunner(EchoRunner):
    def __init__(self, settings: Settings, index: int) -> None:
        raise ModelError("There is no checkpoint in models/nowhere.")


class CrashingRunner(EchoRunner):
    def __init__(self, settings: Settings, index: int) -> None:
        raise SystemExit(3)


class FaultyRunner(EchoRunner):
    """Does what the first label says: dies, hangs with the interpreter held, or talks nonsense."""

    def run(
        self,
        batch: list[Task],
        settle: Callable[[str, Answer | Failure], None],
        cancelled: Callable[[str], bool],
    ) -> dict[str, int]:
        time.sleep(0.1)  # so that company is waiting
        for work in batch:
            good = answer(work)
            match work.labels[0]:
                case "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                case "exit":
                    os._exit(7)
                case "hold":  # as a kernel that does not return, with the interpreter's lock held
                    ctypes.PyDLL(None).sleep(60)
                case "memory":
                    raise MemoryError
                case "noise":  # into every pipe there is, and so into that to the API process
                    for descriptor in range(3, 64):
                        with contextlib.suppress(OSError):
                            os.write(descriptor, b"\0\0\0\x08garbage!")
                case "NaN":
                    settle(work.id, replace(good, scores=[math.nan] * len(work.labels)))
                case "short":
                    settle(work.id, replace(good, scores=[1.0]))
                case "large":
                    settle(work.id, replace(good, scores=[7.0] * len(work.labels)))
                case "nothing":
                    settle(work.id, None)  # type: ignore[arg-type]
                case "twice":
                    settle(work.id, good)
                    settle(work.id, replace(good, scores=[0.0] * len(work.labels)))
                case "forgotten":
                    pass
                case _:
                    settle(work.id, good)
        return {}
