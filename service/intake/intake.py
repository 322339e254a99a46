"""The way of a classification from the socket to the engine and back.

The order is the point: the key's limits and the length are checked before the body is read, the
body is read before a place in the queue is taken (a slow upload holds none), the place is taken
before anything is decoded, and the decoding happens off the event loop.
"""

import asyncio
import os
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ParamSpec, TypeVar

import numpy as np
from fastapi import Request
from pydantic import ValidationError
from starlette.requests import ClientDisconnect

from service.engine.engine import Engine, Watch, look_away
from service.engine.permits import Permit
from service.errors import (
    BadRequest,
    ClientGone,
    DeadlineExceeded,
    QueueFull,
    TooLarge,
    Unprocessable,
    UploadTimeout,
)
from service.intake.decoders import Decoders
from service.intake.image_urls import ImageFetcher, ImageURL
from service.intake.limits import Limits
from service.intake.multipart import check_values
from service.intake.options import resolve_options
from service.intake.similarity import Fingerprint, Similarity
from service.messages import Answer, Task
from service.schemas import Choices
from service.settings import Settings
from service.telemetry.metrics import Metrics
from service.telemetry.traces import record

UPLOADS = 16  # times max_body_bytes: the memory that unfinished bodies may take together
PARSERS = min(4, os.cpu_count() or 1)

NO_IMAGE = np.empty((0, 0, 3), np.uint8)

Parse = Callable[[bytes, str], tuple[bytes | ImageURL, Choices]]
"""A body and its content type to an image file, or where it is, and the rest. Raises ServiceError
or pydantic's ValidationError."""

Amend = Callable[[Task], Task]

P = ParamSpec("P")
T = TypeVar("T")


def _as_it_is(work: Task) -> Task:
    return work


@dataclass(frozen=True, slots=True)
class Outcome:
    """A request, its answer, and where the seconds went."""

    work: Task
    answer: Answer
    model: str
    top_k: int | None
    queue_seconds: float
    decode_seconds: float
    total_seconds: float


@dataclass(frozen=True, slots=True)
class _Opened:
    """What a body holds, and the instants between which its image was decoded."""

    work: Task
    print: Fingerprint
    top_k: int | None
    decoding: float
    decoded: float


class Intake:
    """Lets requests in, one `classify` each."""

    def __init__(self, settings: Settings, metrics: Metrics, engine: Engine) -> None:
        self._settings = settings
        self._metrics = metrics
        self._engine = engine
        self._limits = Limits(settings, metrics)
        self._similarity = Similarity(settings, metrics)
        self.decoders = Decoders(settings, metrics)
        self.links = ImageFetcher(settings, metrics)
        self._arriving = 0  # bytes of unfinished bodies
        self._parsers = ThreadPoolExecutor(PARSERS, thread_name_prefix="parse")

    def close(self) -> None:
        self._parsers.shutdown(wait=False, cancel_futures=True)

    async def classify(
        self, request: Request, parse: Parse, amend: Amend = _as_it_is, watch: Watch = look_away
    ) -> Outcome:
        """Read, decode, `amend` what is to be done, submit; `watch` is the engine's.

        Raises ServiceError.
        """
        began = time.monotonic()
        with self._limits.admit(request.state.caller.id):
            body = await self._receive(request)
            work = self._work(request, parse, amend, watch, body, began)
            return await _while_connected(request, work)

    async def _receive(self, request: Request) -> bytes:
        limit = self._settings.max_body_bytes
        too_large = TooLarge(f"The body is larger than {limit} bytes.")
        declared = request.headers.get("content-length", "")
        if declared.isdecimal() and int(declared) > limit:
            raise too_large
        body = bytearray()
        try:
            async with (
                asyncio.timeout(self._settings.upload_timeout_ms / 1000),
                aclosing(request.stream()) as chunks,
            ):
                async for chunk in chunks:
                    body += chunk
                    self._arriving += len(chunk)
                    if len(body) > limit:
                        raise too_large
                    # Bytes are counted and not uploads: a slow one holds only what it has sent,
                    # so that a few idle connections cannot shut everybody else out.
                    if self._arriving > UPLOADS * limit:
                        self._metrics.rejected.labels("uploads").inc()
                        raise QueueFull("Too much is being uploaded at once.", retry_after=1)
        except TimeoutError:
            raise UploadTimeout("The body did not arrive in time.") from None
        except ClientDisconnect:
            raise ClientGone("The client left.") from None
        finally:
            self._arriving -= len(body)
        return bytes(body)

    async def _work(
        self, request: Request, parse: Parse, amend: Amend, watch: Watch, body: bytes, began: float
    ) -> Outcome:
        with self._engine.reserve(len(body)) as permit:
            kind = request.headers.get("content-type", "")
            source, choices = await self._aside(_translated, parse, body, kind)
            if isinstance(source, bytes):
                opened = await self._prepare(request, amend, source, choices, permit)
                return await self._answer(request, opened, permit, watch, began)
        # An image on its way from elsewhere holds no place, as an upload holds none.
        file = await self.links.fetch(source)
        with self._engine.reserve(len(file)) as permit:
            opened = await self._prepare(request, amend, file, choices, permit)
            return await self._answer(request, opened, permit, watch, began)

    async def _answer(
        self, request: Request, opened: _Opened, permit: Permit, watch: Watch, began: float
    ) -> Outcome:
        work, decode_seconds = opened.work, opened.decoded - opened.decoding
        self._metrics.decode_seconds.observe(decode_seconds)
        self._similarity.check(request.state.caller.id, opened.print)
        answer = await self._engine.submit(permit, work, watch)
        # Beside the key's id: whether a surge is one caller's can be seen nowhere else.
        request.state.log["suspected"] = answer.suspected
        record(work, answer, opened.decoding, opened.decoded, permit.waited)
        total = time.monotonic() - began
        model = self._engine.info["model"]["name"]
        return Outcome(work, answer, model, opened.top_k, permit.waited, decode_seconds, total)

    async def _prepare(
        self, request: Request, amend: Amend, file: bytes, choices: Choices, permit: Permit
    ) -> _Opened:
        work = resolve_options(
            request.state.request_id, NO_IMAGE, choices, self._settings, permit.since
        )
        request.state.log |= {
            "labels": len(work.labels),
            "defense": work.method,
            "steps": work.steps,
            "views": work.views,
        }
        decoding = time.monotonic()
        try:
            async with asyncio.timeout(self._settings.request_timeout_ms / 1000):
                work = replace(work, image=await self.decoders.decode(file))
        except TimeoutError:
            raise DeadlineExceeded("The image was not decoded in time.") from None
        print = self._similarity.fingerprint(work.image, file)
        return _Opened(amend(work), print, choices.top_k, decoding, time.monotonic())

    async def _aside(self, act: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """The result of what takes too long for the event loop."""
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self._settings.request_timeout_ms / 1000):
                return await loop.run_in_executor(self._parsers, partial(act, *args, **kwargs))
        except TimeoutError:
            raise DeadlineExceeded("The body was not parsed in time.") from None


def _translated(parse: Parse, body: bytes, content_type: str) -> tuple[bytes | ImageURL, Choices]:
    check_values(body)
    try:
        return parse(body, content_type)
    except ValidationError as error:
        raise _translate(error) from None


def _translate(error: ValidationError) -> BadRequest | Unprocessable:
    """The first of pydantic's complaints as one sentence, without the client's input."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    if first["type"] == "json_invalid":
        return BadRequest("The body is neither JSON nor a multipart form.")
    where = ".".join(map(str, first["loc"]))
    match first["type"]:
        case "extra_forbidden":
            return Unprocessable(f"The field `{where[:64]}` is unknown.")
        case "missing":
            return Unprocessable(f"The field `{where}` is missing.")
    what = first["msg"].removeprefix("Value error, ")
    return Unprocessable(f"`{where}`: {what}." if where else f"{what}.")


async def _while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of some work, which is cancelled when the client leaves."""
    stay = asyncio.timeout(None)
    try:
        async with stay:
            watcher = asyncio.create_task(_end(stay, request))
            try:
                return await work
            finally:
                watcher.cancel()
    except TimeoutError:
        if not stay.expired():
            raise
        raise ClientGone("The client left.") from None


async def _end(stay: asyncio.Timeout, request: Request) -> None:
    """Once the client has left, let the timeout end now."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    stay.reschedule(asyncio.get_running_loop().time())
