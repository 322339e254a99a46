"""Processes that a load is sent to: the service as started, the same with a worker that answers
at once, and the bare engine without a service."""

import asyncio
import base64
import io
import json
import multiprocessing
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.openloop import post
from service.intake.decode import decode
from service.messages import Answer, Finished, Ready, Settled, Task
from service.settings import Settings
from service.worker.process import prepare_torch
from service.worker.supervisor import Event

LABELS = ("cat", "dog", "school bus", "lemon", "espresso", "cliff", "volleyball", "reel", "fog",
          "keyboard")  # fmt: skip
SIDES = (640, 480)


def draw_file(number: int) -> bytes:
    """A random JPEG of a small photograph's size."""
    source = np.random.default_rng(number)
    coarse = Image.fromarray(source.integers(0, 256, (12, 16, 3)).astype(np.uint8))
    file = io.BytesIO()
    coarse.resize(SIDES, Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
    return file.getvalue()


def draw_requests(count: int) -> list[bytes]:
    """Whole HTTP requests with different pictures."""
    bodies = [
        {"image": base64.b64encode(draw_file(number)).decode(), "candidate_labels": LABELS}
        for number in range(count)
    ]
    return [post("/v1/classify", json.dumps(body).encode()) for body in bodies]


@dataclass(frozen=True, slots=True)
class Replica:
    """A server that listens; `process` is its API process."""

    url: str
    process: subprocess.Popen[str]

    @property
    def pid(self) -> int:
        return self.process.pid

    def cpu_seconds(self) -> float:
        """Processor time that the API process has used, its children's left out."""
        return _cpu_seconds(self.pid)

    def decoder_seconds(self) -> float:
        """Processor time that the decoder processes have used."""
        tasks = Path(f"/proc/{self.pid}/task").glob("*/children")
        children = [int(child) for task in tasks for child in task.read_text().split()]
        return sum(
            _cpu_seconds(child)
            for child in children
            if b"service.intake.decoder" in Path(f"/proc/{child}/cmdline").read_bytes()
        )


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextmanager
def serve(
    flags: Sequence[str], threads: int | None = None, instant: bool = False
) -> Iterator[Replica]:
    """`tapt-serve serve` with these flags on a free port; `instant`: without a model behind it."""
    module = ["benchmarks.replica"] if instant else ["service.cli", "serve"]
    environment = os.environ | ({} if threads is None else {"OMP_NUM_THREADS": str(threads)})
    command = [sys.executable, "-m", *module, "--port", "0", *flags]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        found = re.search(r"http://\S+", process.stdout.readline())
        try:
            if found is None:
                raise SystemExit("the service did not start")
            yield Replica(found.group(), process)
        finally:
            process.terminate()


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
                views=work.views, views_kept=1, entropy_before=0.1, entropy_after=0.1,
                agreement=1.0, suspicion=0.0, suspected=False, truncated=None, labels_truncated=0,
                adapt_seconds=0.0, predict_seconds=0.0,
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
    images = [decode(draw_file(number), settings.max_image_pixels) for number in range(max(sizes))]

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
    return {"times": times, "machine": describe_machine(runner.guard)}


if __name__ == "__main__":
    from service.server import serve as serve_here

    named = dict(zip(sys.argv[1::2], sys.argv[2::2], strict=True))
    knobs = {flag.removeprefix("--").replace("-", "_"): value for flag, value in named.items()}
    sys.exit(serve_here(Settings(**knobs), Instant()))  # type: ignore[arg-type]
