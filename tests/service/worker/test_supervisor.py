"""Real processes, with a runner that has no model: killed, stopped, hanging, crashing, orphaned."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from service.engine.engine import Engine
from service.messages import Fatal, Finished, Heartbeat, Ready, Settled, Task
from service.settings import Settings
from service.telemetry.metrics import Metrics
from service.worker import supervisor as supervision
from service.worker.process import prepare_torch
from service.worker.supervisor import Event, Lost, WorkerProcess
from tests import fake_worker

pytestmark = pytest.mark.alone

ECHO, FATAL, CRASHING = (
    f"{fake_worker.__name__}:{name}" for name in ("EchoRunner", "FatalRunner", "CrashingRunner")
)


def work(id: str, label: str = "cat", size: int = 1, timeout: float = 60.0) -> Task:
    image = np.zeros((size, size, 3), np.uint8)
    deadline = time.monotonic() + timeout
    return Task(id, image, (label, "dog"), "a {}", "tapt", 1, 4, "all", 0, deadline)


def alive(pid: int) -> bool:
    """Whether the process runs; a zombie, which its parent has yet to read, does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


async def reached(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.005)


class Watched:
    """A WorkerProcess, and everything it says."""

    def __init__(self, **arguments: Any) -> None:
        settings = arguments.pop("settings", Settings())
        self.worker = WorkerProcess(settings, 0, **{"runner": ECHO, "backoff": 0.01} | arguments)
        self.events: list[Event] = []

    async def __aenter__(self) -> "Watched":
        self.worker.start(self.events.append)
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.worker.stop()

    @property
    def beat(self) -> Heartbeat:
        """The last one."""
        return next(event for event in reversed(self.events) if isinstance(event, Heartbeat))

    async def until(self, kind: type, count: int = 1) -> list[Any]:
        """The events of a kind, as soon as there are so many."""
        await reached(lambda: sum(isinstance(event, kind) for event in self.events) >= count)
        return [event for event in self.events if isinstance(event, kind)]


def test_a_batch_goes_through_the_process_and_a_cancellation_into_it():
    async def scenario() -> None:
        async with Watched(silence=2.0) as watched:
            await watched.until(Ready)
            large = [work("a", size=1500), work("gone", "hang"), work("b", size=1500)]
            watched.worker.run(large)
            await reached(lambda: watched.beat.stalled_seconds > 0)
            assert watched.beat.stalled_seconds < 20
            assert watched.beat.memory_bytes == 42
            watched.worker.cancel(frozenset({"gone"}))
            assert (await watched.until(Finished))[0].counts == {"text_cache_hits": 3}
            settled = {event.id: event.result for event in await watched.until(Settled, 3)}
            assert settled["a"] == fake_worker.answer(large[0])
            assert settled["gone"].error_type == "client_gone"
            await reached(lambda: watched.beat.stalled_seconds == 0)

            # The second lies ready while the first runs, until nobody wants either.
            for batch in ([work("e", "hang")], [work("f", "hang")]):
                watched.worker.run(batch)
            await reached(lambda: watched.beat.stalled_seconds > 0)
            watched.worker.cancel(frozenset({"f"}))
            watched.worker.cancel(frozenset({"e"}))
            await watched.until(Finished, 3)
            assert [event.id for event in await watched.until(Settled, 4)][3:] == ["e"]

            watched.worker.run([work("c"), work("d", "raise")])
            await watched.until(Finished, 4)
            results = [event.result for event in await watched.until(Settled, 6)][4:]
            assert [result.error_type for result in results] == ["internal", "internal"]
            assert not any(isinstance(event, Lost) for event in watched.events)

    asyncio.run(scenario())


def test_a_kill_with_twenty_requests_in_flight_loses_none():
    async def scenario() -> None:
        settings, metrics = Settings(max_batch_size=20, max_queue_delay_ms=1000), Metrics()
        worker = WorkerProcess(settings, 0, runner=ECHO, backoff=0.01)
        engine = Engine(settings, metrics, [worker])
        await engine.start()
        await reached(lambda: engine.ready)

        async def ask(i: int) -> None:
            permit = engine.reserve(1000)
            try:
                await engine.submit(permit, work(str(i)))
            finally:
                permit.release()

        asked = [asyncio.create_task(ask(i)) for i in range(20)]
        await reached(lambda: engine.queue_depth == 0)  # a batch of 20 takes 0.4 s
        killed = worker.pid
        os.kill(killed, signal.SIGKILL)
        await reached(lambda: not engine.ready)
        assert not any(task.done() for task in asked)
        await asyncio.gather(*asked)
        assert engine.ready
        assert worker.pid != killed
        assert metrics.registry.get_sample_value("tapt_worker_restarts_total") == 1
        await engine.stop(1.0)

    asyncio.run(scenario())


def test_a_stopped_process_is_noticed_and_replaced():
    async def scenario() -> None:
        async with Watched(silence=1.0) as watched:
            await watched.until(Ready)
            await watched.until(
                Heartbeat, len(await watched.until(Heartbeat)) + supervision.BEATS + 2
            )
            assert not any(isinstance(event, Lost) for event in watched.events)
            first = watched.worker.pid
            os.kill(first, signal.SIGSTOP)
            assert not (await watched.until(Lost))[0].exhausted
            await watched.until(Ready, 2)
            assert not alive(first)

    asyncio.run(scenario())


def test_a_batch_without_progress_is_ended(monkeypatch):
    monkeypatch.setattr(supervision, "MIN_STALL", 0.3)

    async def scenario() -> None:
        async with Watched(silence=2.0, settings=Settings(request_timeout_ms=1)) as watched:
            await watched.until(Ready)
            watched.worker.run([work("a", "hang")])
            assert (await watched.until(Lost))[0].reason == "exit code -9"

    asyncio.run(scenario())


def test_crashes_at_the_start_exhaust_a_worker_and_it_is_still_tried_again():
    async def scenario() -> None:
        async with Watched(runner=CRASHING) as watched:
            lost = await watched.until(Lost, supervision.MAX_FAILED_STARTS + 1)
            failed = supervision.MAX_FAILED_STARTS
            assert [event.exhausted for event in lost] == [False] * (failed - 1) + [True] * 2
            assert {event.reason for event in lost} == {"exit code 3"}

    asyncio.run(scenario())


def test_a_model_that_cannot_be_served_is_told_in_its_sentence_and_tried_again():
    async def scenario() -> None:
        async with Watched(runner=FATAL) as watched:
            sentence = "There is no checkpoint in models/nowhere."
            assert [event.message for event in await watched.until(Fatal, 2)] == [sentence] * 2
            assert (await watched.until(Lost))[0] == Lost(sentence)

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("given", "workers", "threads"), [("8", 2, "4"), ("2", 4, "1"), ("3", 1, "3")]
)
def test_workers_divide_the_cores(monkeypatch, given: str, workers: int, threads: str):
    monkeypatch.setenv("OMP_NUM_THREADS", given)
    prepare_torch(workers)
    assert os.environ["OMP_NUM_THREADS"] == threads


def test_without_a_number_of_threads_the_usable_cores_are_divided(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("service.worker.process.count_cores", lambda: 6)
    prepare_torch(1)
    assert "OMP_NUM_THREADS" not in os.environ
    prepare_torch(3)
    assert os.environ["OMP_NUM_THREADS"] == "2"


def test_each_of_two_processes_ends_with_its_own_pipe_and_not_by_signals():
    async def scenario() -> None:
        async with Watched() as first, Watched() as second:
            await first.until(Ready)
            await second.until(Ready)
            pids = first.worker.pid, second.worker.pid
            for pid in pids:
                os.kill(pid, signal.SIGTERM)
                os.kill(pid, signal.SIGINT)
            second.worker.run([work("hanging", "hang")])  # an end of file ends a batch too
            for watched in (first, second):
                began = time.monotonic()
                await watched.worker.stop()
                assert time.monotonic() - began < 2.0  # and not by the kill after 5 s
                assert not any(isinstance(event, Lost) for event in watched.events)
                assert alive(pids[1]) == (watched is first)
            assert not alive(pids[0])

    asyncio.run(scenario())


API_PROCESS = """
import asyncio
from service.settings import Settings
from service.messages import Ready
from service.worker.supervisor import WorkerProcess

async def main():
    workers = [WorkerProcess(Settings(), i, runner="fake_worker:EchoRunner") for i in range(2)]
    for worker in workers:
        worker.start(lambda event: isinstance(event, Ready) and ready.release())
    for worker in workers:
        await ready.acquire()
    print(*(worker.pid for worker in workers), flush=True)
    await asyncio.sleep({pause})

if __name__ == "__main__":
    ready = asyncio.Semaphore(0)
    asyncio.run(main())
"""


@pytest.mark.parametrize("end", ["killed", "left without stopping"])
def test_the_processes_end_with_the_api_process(end, tmp_path):
    script = tmp_path / "api.py"
    script.write_text(API_PROCESS.replace("{pause}", "60" if end == "killed" else "0"))
    path = os.pathsep.join(
        [str(Path(__file__).parents[2]), str(Path(__file__).parent), *filter(None, sys.path)]
    )
    with subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": path}
    ) as api:
        pids = [int(pid) for pid in api.stdout.readline().split()]
        assert len(pids) == 2
        if end == "killed":
            api.kill()
        api.wait(timeout=20)
        until = time.monotonic() + 20
        while any(alive(pid) for pid in pids):
            assert time.monotonic() < until, "the workers outlived the API process"
            time.sleep(0.02)


def test_a_process_that_is_gone_is_not_called_silent(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Where no other can be started for longer than a process may be silent."""
    start, starts = supervision.Process, 0

    def try_to_start(*arguments: Any) -> Any:
        nonlocal starts
        starts += 1
        if starts > 1:
            raise OSError(24, "Too many open files")
        return start(*arguments)

    monkeypatch.setattr(supervision, "Process", try_to_start)

    async def scenario() -> None:
        async with Watched(silence=2.0) as watched:
            await watched.until(Ready)
            first = watched.worker.pid
            assert first is not None
            monkeypatch.setattr(supervision, "START_FACTOR", 1)
            os.kill(first, signal.SIGKILL)
            await watched.until(Lost, 2)
            caplog.clear()
            await asyncio.sleep(3.0)  # silence, and a half
            assert watched.worker.pid is None
            assert "sent no heartbeat" not in caplog.text

    asyncio.run(scenario())


def test_a_machine_that_can_start_no_process_does_not_use_up_the_starts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    short, start = (
        [OSError(24, "Too many open files")] * (supervision.MAX_FAILED_STARTS + 2),
        (supervision.Process),
    )

    def try_to_start(*arguments: Any) -> Any:
        if short:
            raise short.pop()
        return start(*arguments)

    monkeypatch.setattr(supervision, "Process", try_to_start)

    async def scenario() -> None:
        async with Watched(backoff=0.001) as watched:
            await watched.until(Ready)
            assert not any(event.exhausted for event in watched.events if isinstance(event, Lost))

    asyncio.run(scenario())
