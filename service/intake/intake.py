"""Admission of a request, and its way from an open socket to a task for the engine.

`Intake.admit` checks in a fixed order. The key's limits and the declared length come before the
body is read. The body is read before a permit for the queue is taken, so a slow upload holds none.
The permit is taken before anything is parsed. The price is claimed and charged before the image is
decoded.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import numpy as np
from fastapi import Request
from numpy.typing import NDArray
from starlette.requests import ClientDisconnect

from models.defenses.catalog import DEFENSES
from models.images.decode import DecodedImage
from service.engine.engine import Engine
from service.engine.permits import Permit
from service.errors import ClientGone, DeadlineExceeded, TooLarge
from service.intake.body import SMALL_BYTES, parse
from service.intake.content_encoding import decode_content
from service.intake.decoders import Decoders
from service.intake.image_urls import ImageFetcher, ImageURL
from service.intake.limits import Limits
from service.intake.options import check_options, resolve_options
from service.intake.requests import ClassifyOptions
from service.intake.similarity import Similarity, describe_draws
from service.intake.uploads import CAPACITY, Uploads
from service.intake.view_seeds import ViewSeeds
from service.messages import Task
from service.settings import Settings
from service.telemetry.metrics import Metrics
from service.telemetry.traces import trace_decoding

Options = TypeVar("Options", bound=ClassifyOptions)


@dataclass(slots=True)
class Ticket:
    """An admitted request.

    While it waits for its batch, a request holds its task (the pixels of the decoded image and the
    labels) and its options. Its body and its image file are freed before.

    Attributes:
        caller: the id of its API key.
        started: the instant at which its body began to arrive.
        body: empty once it is parsed.
        log: the fields of its log line.
        decode_seconds: how long its image took, waiting for a decoder included.
    """

    request_id: str
    caller: str
    started: float
    content_type: str
    body: bytes
    permit: Permit
    log: dict[str, Any]
    decode_seconds: float = 0.0


class Intake:
    """Admits requests and turns them into tasks."""

    def __init__(self, settings: Settings, metrics: Metrics, engine: Engine) -> None:
        self._settings = settings
        self._metrics = metrics
        self._engine = engine
        self._limits = Limits(settings, metrics)
        self._similarity = Similarity(settings, metrics)
        self._view_seeds = ViewSeeds(settings)
        self.image_urls = ImageFetcher(settings, metrics)
        self.decoders = Decoders(settings, metrics)
        self.uploads = Uploads(CAPACITY * settings.max_body_bytes, metrics)

    async def start(self) -> None:
        """Start the decoder processes."""
        await self.decoders.start()

    async def stop(self) -> None:
        """Stop the decoder processes."""
        await self.decoders.stop()

    @asynccontextmanager
    async def admit(self, request: Request) -> AsyncIterator[Ticket]:
        """Read a request's body and hold its permit while the block runs.

        The block is cancelled when the client disconnects. Raises RateLimited, TooLarge, QueueFull,
        UploadTimeout, NotReady or ClientGone.
        """
        started = time.monotonic()
        with self._limits.admit(request.state.caller.id):
            ticket = self._reserve(request, started, await self._receive(request))
            try:
                async with _cancel_on_disconnect(request):
                    yield ticket
            finally:
                ticket.permit.release()

    async def prepare(
        self, ticket: Ticket, read: Callable[[bytes], tuple[bytes | ImageURL, Options]]
    ) -> tuple[Task, Options]:
        """Parse the body with `read`, fetch and decode the image, and make the task.

        `read` returns the image's file or URL, and the other options without it. This is one
        function so that its caller never holds the body or the file.

        Raises the errors of `read`, `check_options`, `ImageFetcher.fetch`, `Engine.claim`,
        `Decoders.decode` and `Similarity.check`.
        """
        source, options = await parse(ticket.body, read)
        ticket.body = b""
        check_options(options, self._settings)
        if isinstance(source, ImageURL):
            source = await self._fetch(ticket, source)
        # The price is known, and may be refused, before anything is decoded.
        undecoded = DecodedImage(np.zeros((0, 0, 3), np.uint8))
        task = resolve_options(
            ticket.request_id, undecoded, options, self._settings, seed=0, since=ticket.permit.since
        )
        self._limits.charge(ticket.caller, self._engine.claim(ticket.permit, task))
        random = DEFENSES[task.method].random
        # A defense that draws nothing reads view 0 alone, and it takes long to copy all pixels from
        # process to process. Fingerprints that count against a limit are of all pixels.
        keep_pixels = random or self._settings.key_similar_per_hour > 0
        image = await self._decode(ticket, source, keep_pixels)
        draws = describe_draws(task)
        await self._check_similarity(ticket, image.pixels, source, draws)
        ticket.log |= {
            "labels": len(task.labels),
            "defense": task.method,
            "steps": task.steps,
            "views": task.views,
        }
        named = options.defense is not None and options.defense.seed is not None
        # Hashing the pixels takes long, too.
        seed = self._view_seeds.of(image) if random and not named else task.seed
        return replace(task, image=image.pixels, view=image.view, seed=seed), options

    def _reserve(self, request: Request, started: float, body: bytes) -> Ticket:
        state = request.state
        state.log["upload_ms"] = round(1000 * (time.monotonic() - started), 1)
        return Ticket(
            request_id=state.request_id,
            caller=state.caller.id,
            started=started,
            content_type=request.headers.get("content-type", ""),
            body=body,
            permit=self._engine.reserve(len(body), state.caller.id),
            log=state.log,
        )

    async def _receive(self, request: Request) -> bytes:
        limit = self._settings.max_body_bytes
        declared = request.headers.get("content-length", "")
        if declared.isdecimal() and int(declared) > limit:
            raise TooLarge(f"The body is larger than {limit} bytes.")
        encoding = request.headers.get("content-encoding", "")
        body = bytearray()
        seconds = self._settings.upload_timeout_ms / 1000
        try:
            async with (
                self.uploads.receive(request.state.caller.id, seconds) as upload,
                aclosing(request.stream()) as chunks,
                aclosing(decode_content(chunks, encoding, limit)) as pieces,
            ):
                async for piece in pieces:
                    body += piece
                    upload.grow(len(piece))
        except ClientDisconnect:
            raise ClientGone("The client disconnected.") from None
        return bytes(body)

    async def _fetch(self, ticket: Ticket, image: ImageURL) -> bytes:
        """Like an upload, an image that is still arriving holds no permit."""
        ticket.permit.release()
        began = time.monotonic()
        try:
            file = await self.image_urls.fetch(image, ticket.caller)
        finally:
            ticket.log["fetch_ms"] = round(1000 * (time.monotonic() - began), 1)
        ticket.permit = self._engine.reserve(len(file), ticket.caller)
        return file

    async def _decode(self, ticket: Ticket, file: bytes, keep_pixels: bool) -> DecodedImage:
        began = time.monotonic()
        model = self._engine.model
        prepared = model.preprocessing if model else None
        with trace_decoding():
            try:
                async with asyncio.timeout(self._settings.request_timeout_ms / 1000):
                    image = await self.decoders.decode(file, ticket.caller, prepared, keep_pixels)
            except TimeoutError:
                raise DeadlineExceeded("The image was not decoded in time.") from None
        ticket.decode_seconds = time.monotonic() - began
        self._metrics.decode_seconds.observe(ticket.decode_seconds)
        return image

    async def _check_similarity(
        self, ticket: Ticket, image: NDArray[np.uint8], file: bytes, draws: bytes
    ) -> None:
        take = partial(self._similarity.fingerprint, image, file, draws)
        # Of a large file the digest takes long; of a small one less than waking a thread.
        small = len(file) <= SMALL_BYTES
        fingerprint = take() if small else await asyncio.to_thread(take)
        self._similarity.check(ticket.caller, fingerprint)


@asynccontextmanager
async def _cancel_on_disconnect(request: Request) -> AsyncIterator[None]:
    """Cancel the block and raise ClientGone once the client has disconnected."""
    connected = asyncio.timeout(None)
    try:
        async with connected:
            watcher = asyncio.create_task(_end_at_disconnect(connected, request))
            try:
                yield
            finally:
                watcher.cancel()
    except TimeoutError:
        if not connected.expired():
            raise
        raise ClientGone("The client disconnected.") from None


async def _end_at_disconnect(connected: asyncio.Timeout, request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
    connected.reschedule(asyncio.get_running_loop().time())
