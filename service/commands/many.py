"""`tapt-serve classify` with many images: a line of JSON for each, in their order.

The images go through the service's own engine in this process, or through a running server. Lines
are appended as they come, so that the same command resumes after an interruption.
"""

import asyncio
import base64
import hashlib
import json
import os
import time
import uuid
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from models.images.decode import SUFFIXES
from service.commands.client import Client
from service.engine.engine import Engine
from service.errors import Forbidden, ModelError, ServiceError, Unauthorized
from service.http.response import build_response
from service.intake.decoders import Decoders
from service.intake.options import check_options, resolve_options
from service.intake.requests import ClassifyOptions
from service.intake.view_seeds import ViewSeeds
from service.settings import Settings
from service.telemetry.metrics import Metrics
from service.worker.supervisor import WorkerProcess

ATTEMPTS = 20
"""How often an image is sent to a server that asks to wait."""

RECONNECTS, RECONNECT_WAIT = 3, 2.0  # times, seconds
PATIENCE_MS = 3_600_000
"""Nobody waits at the other end of a local run, so its images may wait for each other."""

POLL = 0.05  # seconds

Classify = Callable[[bytes], Awaitable[dict[str, Any]]]
"""The answer to an image file, as the JSON of `Classification`. Raises ServiceError for an error of
this image, ConnectionError for one that every other image would meet too."""


def find_images(sources: Sequence[str], listed: Iterable[bytes]) -> list[str]:
    """The files that the arguments name: files as they are, the images of directories, sorted, and
    for `-` the names in `listed`, one a line. A name may hold any bytes, as the system's may."""
    found: list[str] = []
    for source in sources:
        if source == "-":
            found += [os.fsdecode(line) for each in listed if (line := each.rstrip(b"\r\n"))]
        elif Path(source).is_dir():
            files = (path for path in Path(source).rglob("*") if path.suffix.lower() in SUFFIXES)
            found += sorted(str(path) for path in files if path.is_file())
        else:
            found.append(source)
    return list(dict.fromkeys(found))


@asynccontextmanager
async def local(settings: Settings, options: ClassifyOptions) -> AsyncIterator[Classify]:
    """The engine, its workers and decoders, as a server has them. Raises ModelError."""
    patient = max(settings.request_timeout_ms, PATIENCE_MS)
    settings = settings.model_copy(update={"request_timeout_ms": patient})
    check_options(options, settings)
    metrics = Metrics()
    workers = [WorkerProcess(settings, index) for index in range(settings.workers)]
    engine, decoders = Engine(settings, metrics, workers), Decoders(settings, metrics)
    seeds = ViewSeeds(settings)
    await engine.start()
    await decoders.start()

    async def classify(file: bytes) -> dict[str, Any]:
        if engine.fatal:
            raise ConnectionError(engine.fatal)
        permit = engine.reserve(len(file))
        try:
            began = time.monotonic()
            prepared = engine.model.preprocessing if engine.model else None
            image = await decoders.decode(file, preprocessing=prepared)
            decode_seconds = time.monotonic() - began
            seed = seeds.of(image)
            task = resolve_options(
                uuid.uuid4().hex, image, options, settings, seed=seed, since=began
            )
            engine.claim(permit, task)
            answer = await engine.submit(permit, task)
        finally:
            permit.release()
        shown = build_response(
            task,
            answer,
            model=engine.info["model"]["name"],
            queue_seconds=permit.waited,
            decode_seconds=decode_seconds,
            total_seconds=time.monotonic() - began,
            top_k=options.top_k,
        )
        return shown.model_dump()

    try:
        while not engine.ready:
            if engine.fatal:
                raise ModelError(engine.fatal)
            await asyncio.sleep(POLL)
        yield classify
    finally:
        await engine.stop(0.0)
        await decoders.stop()


@asynccontextmanager
async def remote(
    url: str, key: str, body: Mapping[str, Any], concurrency: int
) -> AsyncIterator[Classify]:
    """A running server, asked in as many threads as images are sent at once."""
    loop = asyncio.get_running_loop()
    with Client(url, key) as client, ThreadPoolExecutor(concurrency) as threads:

        async def classify(file: bytes) -> dict[str, Any]:
            asked = {**body, "image": base64.b64encode(file).decode()}
            for attempt in range(RECONNECTS + 1):
                try:
                    answer = loop.run_in_executor(threads, client.request, "/v1/classify", asked)
                    return dict(await answer)
                except ConnectionError:
                    if attempt == RECONNECTS:
                        raise
                    await asyncio.sleep(RECONNECT_WAIT)
            raise AssertionError("unreachable")

        yield classify


async def classify_file(name: str, classify: Classify) -> dict[str, Any]:
    """The line of a file: its answer, or its error. A busy server is asked again when it says.

    Raises ConnectionError, Unauthorized or Forbidden, which every other file would meet, too.
    """
    try:
        file = await asyncio.to_thread(Path(name).read_bytes)
    except OSError as error:
        return _failed(name, error.strerror or str(error), "unreadable")
    except ValueError as error:  # no file can have this name
        return _failed(name, str(error), "unreadable")
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return {"file": name} | await classify(file)
        except (Unauthorized, Forbidden):
            raise
        except ServiceError as error:
            if error.retry_after is None or attempt == ATTEMPTS:
                return _failed(name, error.message, error.error_type)
            await asyncio.sleep(error.retry_after)
    raise AssertionError("unreachable")


async def in_order(
    names: Iterable[str], work: Callable[[str], Awaitable[dict[str, Any]]], concurrency: int
) -> AsyncIterator[dict[str, Any]]:
    """The results in the order of the names; `concurrency` are worked on at once, and at most twice
    as many are held."""
    places = asyncio.Semaphore(concurrency)

    async def run(name: str) -> dict[str, Any]:
        async with places:
            return await work(name)

    pending: deque[asyncio.Task[dict[str, Any]]] = deque()
    try:
        for name in names:
            if len(pending) == 2 * concurrency:
                yield await pending.popleft()
            pending.append(asyncio.create_task(run(name)))
        while pending:
            yield await pending.popleft()
    finally:
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)


class Output:
    """Lines of JSON, on standard output or in a file. A context manager.

    A file's answers to the same question are kept and not asked for again; failed files are tried
    again. At the end the lines are in the order of the files. What is not ASCII is escaped, also
    bytes of names that are no UTF-8 (as surrogates) and what other programs take for line ends.

    Args:
        path: None for standard output.
        question: what identifies the request and the model, apart from the image.
    """

    def __init__(self, path: Path | None, question: Mapping[str, Any]) -> None:
        self._path = path
        text = json.dumps(question, sort_keys=True)
        self._key = hashlib.sha256(text.encode()).hexdigest()[:12]
        self.done: dict[str, str] = {}
        if path and path.exists():
            self._read(path)
            self._replace(self.done.values())
        self._file = path.open("a", encoding="utf-8") if path else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file:
            self._file.close()

    def write(self, line: Mapping[str, Any]) -> None:
        """Append a line. Raises OSError."""
        text = json.dumps({"question": self._key, **line})
        print(text, file=self._file, flush=True)
        self.done[line["file"]] = text

    def finish(self, names: Sequence[str]) -> None:
        """Put the lines in the order of the names; those of other files come first."""
        if self._file:
            listed = set(names)
            others = [text for name, text in self.done.items() if name not in listed]
            self._replace([*others, *(self.done[name] for name in names)])

    def _read(self, path: Path) -> None:
        # A run that was killed may have torn a character.
        with path.open(encoding="utf-8", errors="replace", newline="\n") as file:
            for number, text in enumerate(file, 1):
                self._keep(path, number, text.rstrip("\n"))

    def _keep(self, path: Path, number: int, text: str) -> None:
        """Remember a line of the file if it holds an answer. Raises ValueError if this command did
        not write it, or for another question."""
        try:
            line = json.loads(text)
            name, question, failed = line["file"], line["question"], "error" in line
        except (ValueError, KeyError, TypeError):
            if number == 1:
                raise ValueError(f"{path} exists and was not written by this command.") from None
            return  # the last line of a run that was killed
        if question != self._key:
            raise ValueError(
                f"{path} holds answers to other labels, options or another model; name another "
                "--output."
            )
        if not failed:
            self.done[name] = text

    def _replace(self, lines: Iterable[str]) -> None:
        assert self._path is not None
        fresh = self._path.with_name(self._path.name + ".part")
        fresh.write_text("".join(f"{text}\n" for text in lines), encoding="utf-8")
        os.replace(fresh, self._path)


async def run(names: Sequence[str], classify: Classify, output: Output, concurrency: int) -> int:
    """Classify all files that have no answer yet. Returns how many failed."""
    left = [name for name in names if name not in output.done]
    failed = 0
    columns = BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    console = Console(stderr=True)
    with Progress(TextColumn("classifying"), *columns, console=console) as bar:
        task = bar.add_task("", total=len(names), completed=len(names) - len(left))
        lines = in_order(left, lambda name: classify_file(name, classify), concurrency)
        async for line in lines:
            failed += "error" in line
            output.write(line)
            bar.advance(task)
    output.finish(names)
    return failed


def _failed(name: str, error: str, error_type: str) -> dict[str, Any]:
    return {"file": name, "error": error, "error_type": error_type}
