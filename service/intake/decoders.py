"""Decode images in processes that can be killed.

Every image is opened by one of a few decoder processes, which have limits of time and memory and
hardly any rights. An image that exceeds a limit, or crashes native code, ends its process and is
refused; another process takes its place, and other requests do not notice.

An image's time includes its wait for a decoder, so none is answered late. One that has waited for
most of it is refused without being begun: its decoder would be killed halfway, and with more images
than the decoders can take they would be busy starting again. Callers take turns: one that sends
expensive images waits behind the others.
"""

import asyncio
import logging
from collections.abc import Coroutine
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from models.images.decode import DecodedImage
from models.images.preprocess import Preprocessing
from service.errors import ImageTooCostly, NotReady, QueueFull, ServiceError
from service.intake.decode import OutOfMemory
from service.intake.decoder_process import DecodeLimits, DecoderProcess
from service.intake.turns import Turns
from service.settings import Settings
from service.telemetry.metrics import Metrics
from service.worker.process import count_cores

MAX_DECODERS = 4
WALL_TIME = 1.5
"""Times the processor time that an image may take: all its time, waiting included."""
RESERVE = 0.25
"""Times the processor time that an image may take: what must be left when its wait ends. Ordinary
images take a small part of it."""

ORDINARY_SHARE = 8
"""Images that need at most this part of the memory limit are decoded side by side."""

BACKOFF, MAX_BACKOFF = 0.5, 10.0  # seconds between attempts to start a process
RETRY_AFTER = 5.0  # seconds
GRACE = 0.1
"""Seconds that decoding may go on for a client that left. Starting a process costs more than most
images, so clients that leave at once cannot keep the decoders busy with that."""

log = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(slots=True)
class _Image:
    """A file, who sent it, the checkpoint's preprocessing, whether more than view 0 is wanted, the
    instants by which its waiting must end and by which it must be decoded, and the seconds it has
    waited for its turns so far."""

    file: bytes
    caller: str
    preprocessing: Preprocessing | None
    keep_pixels: bool
    latest: float
    deadline: float
    waited: float = 0.0


class Decoders:
    """A pool of decoder processes."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self._count = settings.decoders or min(MAX_DECODERS, count_cores())
        self._pixels = settings.max_image_pixels
        self._memory = settings.decode_memory_bytes
        self._seconds = settings.decode_timeout_ms / 1000
        self._slack = (WALL_TIME - 1) * self._seconds
        self._metrics = metrics
        self._idle: Turns[DecoderProcess] = Turns()
        self._large: Turns[None] = Turns()
        self._large.put(None)
        self._keepers: list[asyncio.Task[None]] = []
        self._usable: set[int] = set()  # slots whose last process got warm
        self._failing: set[int] = set()  # slots whose last process did not

    @property
    def ready(self) -> bool:
        """Whether images can be decoded. A process that was killed counts until its replacement
        fails to start: a client that has decoders killed cannot make the service unready."""
        return bool(self._usable)

    async def start(self) -> None:
        """Begin to start the processes; `ready` turns true when the first one is warm."""
        self._keepers = [asyncio.create_task(self._keep(slot)) for slot in range(self._count)]

    async def stop(self) -> None:
        """Kill the processes, whatever they do."""
        for keeper in self._keepers:
            keeper.cancel()
        await asyncio.gather(*self._keepers, return_exceptions=True)
        self._usable.clear()

    async def decode(
        self,
        file: bytes,
        caller: str = "",
        preprocessing: Preprocessing | None = None,
        keep_pixels: bool = True,
    ) -> DecodedImage:
        """The image in a file, as `service.intake.decode.decode` gives it. Cancelling this ends the
        decoding.

        Raises what that function raises; ImageTooCostly also for an image that exceeds its limits
        or crashes its decoder; QueueFull if it waited for too much of its time; NotReady when no
        decoder can be started.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + WALL_TIME * self._seconds
        latest = deadline - RESERVE * self._seconds
        image = _Image(file, caller, preprocessing, keep_pixels, latest, deadline)
        work = asyncio.create_task(self._decode(image))
        try:
            return await asyncio.shield(work)
        except NotReady:
            self._metrics.rejected.labels("no_decoder").inc()
            raise
        except asyncio.CancelledError:
            loop.call_later(GRACE, work.cancel)
            raise

    async def _decode(self, image: _Image) -> DecodedImage:
        ordinary = self._memory // ORDINARY_SHARE
        with suppress(OutOfMemory):
            limits = DecodeLimits(self._pixels, ordinary, self._seconds, cautious=True)
            return await self._attempt(image, limits)
        # One such image at a time, so that a few cannot take the machine's memory together.
        await self._wait(image, self._large.take(image.caller, self._seconds))
        began = _now()
        try:
            limits = DecodeLimits(self._pixels, self._memory, self._seconds, cautious=False)
            return await self._attempt(image, limits)
        finally:
            self._large.refund(image.caller, self._seconds - (_now() - began))
            self._large.put(None)

    async def _attempt(self, image: _Image, limits: DecodeLimits) -> DecodedImage:
        while True:
            decoder = await self._take(image)
            with suppress(ConnectionError):  # it ended before it had read the file: try another
                return await self._run(decoder, image, limits)

    async def _take(self, image: _Image) -> DecoderProcess:
        while len(self._failing) < self._count:
            decoder = await self._wait(image, self._idle.take(image.caller, self._seconds))
            if decoder.alive:
                return decoder
            self._idle.refund(image.caller, self._seconds)
        raise _unavailable()

    async def _wait(self, image: _Image, turn: Coroutine[Any, Any, T]) -> T:
        began = _now()
        try:
            async with asyncio.timeout_at(image.latest):
                return await turn
        except TimeoutError:
            raise self._busy() from None
        finally:
            image.waited += _now() - began

    async def _run(
        self, decoder: DecoderProcess, image: _Image, limits: DecodeLimits
    ) -> DecodedImage:
        began = _now()
        try:
            reply = await self._exchange(decoder, image, limits)
        finally:
            self._idle.refund(image.caller, self._seconds - (_now() - began))
            if decoder.leaving:
                decoder.kill()
                await decoder.wait()  # then its memory is free
            else:
                self._idle.put(decoder)
        if decoder.leaving and isinstance(reply, OutOfMemory):
            self._metrics.decoder_kills.labels("memory").inc()
        if isinstance(reply, ServiceError):
            raise reply
        return reply

    async def _exchange(
        self, decoder: DecoderProcess, image: _Image, limits: DecodeLimits
    ) -> DecodedImage | ServiceError:
        try:
            async with asyncio.timeout_at(image.deadline):
                return await decoder.exchange(
                    image.file, limits, image.preprocessing, image.keep_pixels
                )
        except TimeoutError:
            refusal = self._refuse(decoder, "timeout")
            # Without its wait it would have had time enough to use up its processor time.
            raise (self._busy() if image.waited > self._slack else refusal) from None
        except ValueError as error:
            log.error("a decoder sent an invalid reply: %s", error)
            raise self._refuse(decoder, "crash") from None
        except ConnectionError:
            decoder.kill()
            raise
        except EOFError:
            raise self._refuse(decoder, await decoder.cause_of_death()) from None
        except asyncio.CancelledError:
            self._refuse(decoder, "cancelled")
            raise

    def _busy(self) -> QueueFull:
        self._metrics.rejected.labels("decoders").inc()
        return QueueFull("Too many images wait to be decoded.", retry_after=RETRY_AFTER)

    def _refuse(self, decoder: DecoderProcess, reason: str) -> ImageTooCostly:
        decoder.kill()
        self._metrics.decoder_kills.labels(reason).inc()
        return ImageTooCostly(_REFUSALS[reason])

    async def _keep(self, slot: int) -> None:
        """Start a process, wait until it ends, start the next."""
        delay = BACKOFF
        while True:
            try:
                decoder = await DecoderProcess.start()
            except Exception as error:
                # Whatever the machine is short of (memory, descriptors, threads), it may pass.
                log.error("a decoder did not start: %r", error)
                self._usable.discard(slot)
                if slot not in self._failing:
                    self._failing.add(slot)
                    if len(self._failing) == self._count:
                        self._idle.fail(_unavailable())
                await asyncio.sleep(delay)
                delay = min(2 * delay, MAX_BACKOFF)
                continue
            delay = BACKOFF
            self._usable.add(slot)
            self._failing.discard(slot)
            self._metrics.decoders_up.inc()
            self._idle.put(decoder)
            try:
                await decoder.wait()
            finally:
                self._metrics.decoders_up.dec()
                await decoder.end()
            self._metrics.decoder_restarts.inc()


_REFUSALS = {
    "timeout": "The image takes too long to decode.",
    "memory": "The image needs too much memory to decode.",
    "crash": "The image cannot be decoded.",
    "cancelled": "Nobody waits for the image any more.",
}


def _unavailable() -> NotReady:
    return NotReady("No image can be decoded now.", retry_after=RETRY_AFTER)


def _now() -> float:
    return asyncio.get_running_loop().time()
