"""Parts of the service by themselves: the bare engine without HTTP, and the API process without a
model."""

import asyncio
import multiprocessing
import sys
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

from benchmarks.harness.requests import LABELS, draw_file
from benchmarks.harness.server import Server, read_knobs
from service.intake.decode import decode
from service.messages import Answer, Finished, Ready, Settled, Task
from service.settings import Settings
from service.worker.process import prepare_torch
from service.worker.supervisor import Event


def serve_instantly(*flags: str) -> Server:
    """The server with a worker that answers at once."""
    return Server(*flags, command=(sys.executable, "-m", "benchmarks.isolated"))


class Instant:
    """A worker that answers at once."""

    def start(self, deliver: Callable[[Event], None]) -> None:
        self._deliver = deliver
        ready = Ready({"model": {"name": "instant"}}, 10**9, 10, 77)
        asyncio.get_running_loop().call_soon(deliver, ready)

    def run(self, batch: list[Task]) -> None:
        asyncio.get_running_loop().call_soon(self._answer, batch)

    def _answer(self, batch: list[Task]) -> None:
        for work in batch:
            scores = [1.0, *[0.0] * (len(work.labels) - 1)]
            answer = Answer(
                scores=scores, undefended_scores=scores, design="vli", steps=work.steps,
                views=work.views, views_kept=1, readout=work.readout, entropy_before=0.1,
                entropy_after=0.1, agreement=1.0, suspicion=0.0, suspected=False, truncated=None,
                labels_truncated=0, adapt_seconds=0.0, predict_seconds=0.0,
            )  # fmt: skip
            self._deliver(Settled(work.id, answer))
        self._deliver(Finished())

    def cancel(self, ids: frozenset[str]) -> None: ...

    async def stop(self) -> None: ...


def measure_bare(settings: Settings, sizes: Sequence[int], seconds: float) -> dict[str, Any]:
    """The engine alone, in as many processes as the settings have workers, each with its share of
    the cores, all at the same time: seconds of a batch by its size, images a second of all together
    in batches of the last size, and processor, memory and versions."""
    tasks = [(settings, index, list(sizes), seconds) for index in range(settings.workers)]
    with multiprocessing.get_context("spawn").Pool(settings.workers) as pool:
        found = pool.starmap(_measure_bare, tasks, chunksize=1)
    return found[0] | {"rate": sum(sizes[-1] / median(one["times"][sizes[-1]]) for one in found)}


def _measure_bare(
    settings: Settings, index: int, sizes: list[int], seconds: float
) -> dict[str, Any]:
    prepare_torch(settings.workers)
    from models.evaluation.provenance import describe_machine
    from service.worker.runner import Runner

    runner = Runner(settings, index)
    images = [
        decode(draw_file(number), settings.max_image_pixels).pixels for number in range(max(sizes))
    ]

    def run(size: int) -> float:
        batch = [
            Task(
                id=str(number), image=images[number], labels=LABELS, template=None,
                method=settings.method, steps=settings.steps, views=settings.views,
                readout=settings.readout, seed=number, deadline=time.monotonic() + 3600,
            )
            for number in range(size)
        ]  # fmt: skip
        begun = time.perf_counter()
        runner.run(batch, lambda id, result: None, lambda id: False)
        return time.perf_counter() - begun

    run(max(sizes))
    times: dict[int, list[float]] = {size: [] for size in sizes}
    end = time.monotonic() + seconds
    while time.monotonic() < end or not all(times.values()):
        for size in sizes:
            times[size].append(run(size))
    return {"times": times, "machine": describe_machine(runner.classifier)}


if __name__ == "__main__":
    from service.server import serve

    sys.exit(serve(read_knobs(sys.argv[1:]), Instant()))
