"""Decode images in processes that can be killed.

Every image is opened by one of a few decoder processes, which have limits of time and memory and
hardly any rights. An image that exceeds a limit, or crashes native code, ends its process and is
refused; another process takes its place, and other requests do not notice.

Each process has a socket of its own, so one that dies can neither hold a shared lock nor cut off
another's message. Pools that share a queue (multiprocessing, concurrent.futures, pebble) do not
promise that.
"""

import asyncio
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from contextlib import suppress
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from models.images.decode import MAX_LONG_SIDE, MAX_SHORT_SIDE
from service.errors import ImageTooCostly, InternalError, NotReady, ServiceError, make_error
from service.intake.decode import OutOfMemory
from service.intake.decoder import REPLY, REQUEST, Status
from service.settings import Settings
from service.telemetry.metrics import Metrics
from service.worker.process import count_cores

PROGRAM = ("-P", "-m", "service.intake.decoder")
MAX_DECODERS = 4
WALL_TIME = 1.5  # times the processor time
MIN_SECONDS = 0.01  # a timer of 0 would never end
ORDINARY_SHARE = 8
"""Images that need at most this part of the memory limit are decoded side by side."""

START_TIMEOUT = 30.0  # seconds
BACKOFF, MAX_BACKOFF = 0.5, 10.0  # seconds between attempts to start a process
RETRY_AFTER = 5.0  # seconds
GRACE = 0.1
"""Seconds that decoding may go on for a client that left. Starting a process costs more than most
images, so clients that leave at once cannot keep the decoders busy with that."""

MAX_PIXELS = MAX_SHORT_SIDE * MAX_LONG_SIDE  # of a reply
MAX_MESSAGE = 1024  # bytes of an error in a reply

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Limits:
    """Pixels, bytes of memory, and seconds of processor time. `cautious` refuses at once what is
    expected to need more memory."""

    pixels: int
    memory: int
    seconds: float
    cautious: bool


class Decoders:
    """A pool of decoder processes."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self._count = settings.decoders or min(MAX_DECODERS, count_cores())
        self._pixels = settings.max_image_pixels
        self._memory = settings.decode_memory_bytes
        self._seconds = settings.decode_timeout_ms / 1000
        self._metrics = metrics
        self._idle: asyncio.Queue[_Decoder | None] = asyncio.Queue()
        self._large = asyncio.Lock()
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

    async def decode(self, file: bytes) -> NDArray[np.uint8]:
        """The image in a file, as `service.intake.decode.decode` gives it. Cancelling the caller
        ends the decoding.

        Raises what that function raises; ImageTooCostly also for an image that exceeds its limits
        or crashes its decoder; NotReady when no decoder can be started.
        """
        work = asyncio.create_task(self._decode(file))
        try:
            return await asyncio.shield(work)
        except asyncio.CancelledError:
            asyncio.get_running_loop().call_later(GRACE, work.cancel)
            raise

    async def _decode(self, file: bytes) -> NDArray[np.uint8]:
        clock = asyncio.get_running_loop().time
        ordinary = self._memory // ORDINARY_SHARE
        decoder = await self._take()
        began = clock()
        with suppress(OutOfMemory):
            limits = _Limits(self._pixels, ordinary, self._seconds, cautious=True)
            return await self._run(decoder, file, limits)
        left = max(MIN_SECONDS, self._seconds - (clock() - began))
        # One such image at a time, so that a few cannot take the machine's memory together.
        async with self._large:
            decoder = await self._take()
            limits = _Limits(self._pixels, self._memory, left, cautious=False)
            return await self._run(decoder, file, limits)

    async def _run(self, decoder: "_Decoder", file: bytes, limits: _Limits) -> NDArray[np.uint8]:
        try:
            async with asyncio.timeout(WALL_TIME * limits.seconds):
                reply = await decoder.exchange(file, limits)
        except TimeoutError:
            raise self._refuse(decoder, "timeout") from None
        except ValueError as error:
            log.error("a decoder sent nonsense: %s", error)
            raise self._refuse(decoder, "crash") from None
        except ConnectionError:  # it ended before it had read the file, which is innocent
            decoder.kill()
            return await self._run(await self._take(), file, limits)
        except EOFError:
            raise self._refuse(decoder, await decoder.cause_of_death()) from None
        except asyncio.CancelledError:
            self._refuse(decoder, "cancelled")
            raise
        if not decoder.leaving:
            self._idle.put_nowait(decoder)
        elif isinstance(reply, OutOfMemory):
            self._metrics.decoder_kills.labels("memory").inc()
        if isinstance(reply, ServiceError):
            raise reply
        return reply

    async def _take(self) -> "_Decoder":
        while True:
            decoder = await self._idle.get()
            if decoder is None:  # wakes those who wait when no process can be started
                if len(self._failing) == self._count:
                    self._idle.put_nowait(None)
                    raise NotReady("No image can be decoded now.", retry_after=RETRY_AFTER)
            elif decoder.alive:
                return decoder

    def _refuse(self, decoder: "_Decoder", reason: str) -> ImageTooCostly:
        decoder.kill()
        self._metrics.decoder_kills.labels(reason).inc()
        return ImageTooCostly(_REFUSALS[reason])

    async def _keep(self, slot: int) -> None:
        """One process after the other."""
        delay = BACKOFF
        while True:
            try:
                decoder = await _Decoder.start()
            except (OSError, EOFError, TimeoutError) as error:
                log.error("a decoder did not start: %r", error)
                self._usable.discard(slot)
                if slot not in self._failing:
                    self._failing.add(slot)
                    if len(self._failing) == self._count:
                        self._idle.put_nowait(None)
                await asyncio.sleep(delay)
                delay = min(2 * delay, MAX_BACKOFF)
                continue
            delay = BACKOFF
            self._usable.add(slot)
            self._failing.discard(slot)
            self._metrics.decoders_up.inc()
            self._idle.put_nowait(decoder)
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


class _Decoder:
    """One process and the socket to it. `leaving`: the process ends by itself."""

    def __init__(self, process: subprocess.Popen[bytes], connection: socket.socket) -> None:
        self.leaving = False
        self._process = process
        self._connection = connection
        self._in_use = asyncio.Lock()
        self._ended = asyncio.Event()
        threading.Thread(target=self._wait, args=(asyncio.get_running_loop(),), daemon=True).start()

    @classmethod
    async def start(cls) -> Self:
        """A warm process. Raises OSError, EOFError or TimeoutError."""
        here, there = socket.socketpair()
        here.setblocking(False)
        # A new program, because a fork of this threaded process could deadlock, with a bare
        # environment, because this process may have its keys there.
        try:
            process = subprocess.Popen(
                (sys.executable, *PROGRAM),
                stdin=there.fileno(),
                stdout=subprocess.DEVNULL,
                env=_environment(),
                start_new_session=True,
            )
        except OSError:
            here.close()
            raise
        finally:
            there.close()
        decoder = cls(process, here)
        try:
            async with asyncio.timeout(START_TIMEOUT):
                await decoder._receive(REPLY.size)
        except BaseException:
            await decoder.end()
            raise
        return decoder

    @property
    def alive(self) -> bool:
        try:
            self._connection.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return True
        except OSError:
            pass
        return False  # it ended, or says what nobody asked

    async def exchange(self, file: bytes, limits: _Limits) -> NDArray[np.uint8] | ServiceError:
        """Have a file decoded. Raises ConnectionError when the process ends before it has read all
        of the file, EOFError when it ends later, ValueError when it replies nonsense.
        """
        loop = asyncio.get_running_loop()
        head = REQUEST.pack(
            len(file), limits.pixels, limits.memory, limits.seconds, limits.cautious
        )
        async with self._in_use:
            # A Unix socket whose other end closed tells whether it left bytes unread.
            await loop.sock_sendall(self._connection, head)
            await loop.sock_sendall(self._connection, file)
            return await self._read_reply()

    async def _read_reply(self) -> NDArray[np.uint8] | ServiceError:
        """The process has parsed a hostile file: its words are checked like a client's."""
        status, self.leaving, size, height, width = REPLY.unpack(await self._receive(REPLY.size))
        if status == Status.PIXELS:
            if not 0 < height * width <= MAX_PIXELS or size != height * width * 3:
                raise ValueError(f"{size} bytes for {height} x {width} pixels")
            pixels = np.empty((height, width, 3), np.uint8)
            await self._fill(pixels.data.cast("B"))
            return pixels
        if size > MAX_MESSAGE:
            raise ValueError(f"an error of {size} bytes")
        kind, _, message = (await self._receive(size)).decode().partition(" ")
        if status == Status.OUT_OF_MEMORY:
            return OutOfMemory(message)
        error = make_error(kind, message)
        if isinstance(error, InternalError):
            raise ValueError(f"an error of type {kind!r}")
        return error

    async def _receive(self, size: int) -> bytes:
        buffer = bytearray(size)
        await self._fill(memoryview(buffer))
        return bytes(buffer)

    async def _fill(self, view: memoryview) -> None:
        loop = asyncio.get_running_loop()
        while view:
            received = await loop.sock_recv_into(self._connection, view)
            if not received:
                raise EOFError
            view = view[received:]

    async def cause_of_death(self) -> str:
        """Why a process that closed its socket has ended."""
        self.kill()  # in case it only closed the socket; the end of one that ends stays as it is
        await self._ended.wait()
        code = self._process.returncode
        if code == -signal.SIGPROF:
            return "timeout"
        if code == -signal.SIGKILL:  # by the kernel, which had no memory left
            return "memory"
        log.error("a decoder crashed: exit code %d", code)
        return "crash"

    async def wait(self) -> None:
        """Until the process has ended."""
        await self._ended.wait()

    def _wait(self, loop: asyncio.AbstractEventLoop) -> None:
        """Not by asyncio's child watcher: its `kill` may take away the exit code."""
        self._process.wait()
        with suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(self._ended.set)

    def kill(self) -> None:
        self._process.kill()

    async def end(self) -> None:
        """See to it that the process is gone."""
        self.kill()
        await self._ended.wait()
        async with self._in_use:  # who waits for a reply sees the end of the stream first
            self._connection.close()


def _environment() -> dict[str, str]:
    inherited = {
        name: os.environ[name] for name in ("LD_LIBRARY_PATH", "LANG") if name in os.environ
    }
    return inherited | {
        "PYTHONPATH": os.pathsep.join(sys.path),
        "OPENBLAS_NUM_THREADS": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
