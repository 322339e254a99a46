"""One decoder process, seen from the API process: its start, its socket, its end.

Each process has a socket of its own, so one that dies can neither hold a shared lock nor cut off
another's message. Pools that share a queue (multiprocessing, concurrent.futures, pebble) do not
promise that.
"""

import asyncio
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from models.images.decode import MAX_LONG_SIDE, MAX_SHORT_SIDE, DecodedImage
from models.images.preprocess import Preprocessing
from service.errors import InternalError, ServiceError, make_error
from service.intake.decode import OutOfMemory
from service.intake.decoder import REPLY, REQUEST, Status

PROGRAM = ("-P", "-m", "service.intake.decoder")
START_TIMEOUT = 30.0  # seconds
MAX_PIXELS = MAX_SHORT_SIDE * MAX_LONG_SIDE  # of a reply
MAX_MESSAGE = 1024  # bytes of an error in a reply

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class DecodeLimits:
    """Pixels, bytes of memory, and seconds of processor time. `cautious` refuses at once what is
    expected to need more memory."""

    pixels: int
    memory: int
    seconds: float
    cautious: bool


class DecoderProcess:
    """One process and the socket to it. `leaving`: it ends, by itself or because it was killed."""

    def __init__(self, process: subprocess.Popen[bytes], connection: socket.socket) -> None:
        self.leaving = False
        self._process = process
        self._connection = connection
        self._in_use = asyncio.Lock()
        self._ended = asyncio.Event()
        threading.Thread(target=self._wait, args=(asyncio.get_running_loop(),), daemon=True).start()

    @classmethod
    async def start(cls) -> Self:
        """A warm process. Raises OSError, EOFError, TimeoutError, or RuntimeError if no thread can
        be started."""
        here, there = socket.socketpair()
        try:
            here.setblocking(False)
            with there:
                process = _spawn(there)
            try:
                decoder = cls(process, here)
            except BaseException:
                process.kill()
                process.wait()
                raise
        except BaseException:
            here.close()
            raise
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
        return False  # it ended, or sent something unasked

    async def exchange(
        self,
        file: bytes,
        limits: DecodeLimits,
        preprocessing: Preprocessing | None,
        keep_pixels: bool = True,
    ) -> DecodedImage | ServiceError:
        """Have a file decoded, see `service.intake.decode.decode`.

        Raises ConnectionError when the process ends before it has read all of the file, EOFError
        when it ends later, ValueError if its reply is invalid.
        """
        loop = asyncio.get_running_loop()
        prepared = json.dumps(asdict(preprocessing)).encode() if preprocessing else b""
        head = REQUEST.pack(
            len(prepared),
            len(file),
            limits.pixels,
            limits.memory,
            limits.seconds,
            limits.cautious,
            keep_pixels,
        )
        async with self._in_use:
            # A Unix socket whose other end closed tells whether it left bytes unread.
            await loop.sock_sendall(self._connection, head + prepared)
            await loop.sock_sendall(self._connection, file)
            return await self._read_reply(preprocessing.crop if preprocessing else 0)

    async def _read_reply(self, crop: int) -> DecodedImage | ServiceError:
        """The process has parsed a hostile file, so its reply is checked like a client's input."""
        head = REPLY.unpack(await self._receive(REPLY.size))
        status, self.leaving, size, height, width, side = head
        if status == Status.PIXELS:
            expected = 3 * (height * width + side**2)
            if not 0 < height * width <= MAX_PIXELS or side not in (0, crop) or size != expected:
                raise ValueError(f"{size} bytes for {height} x {width} pixels and a view of {side}")
            pixels = await self._receive_pixels(height, width)
            return DecodedImage(pixels, await self._receive_pixels(side, side) if side else None)
        if size > MAX_MESSAGE:
            raise ValueError(f"an error of {size} bytes")
        kind, _, message = (await self._receive(size)).decode().partition(" ")
        if status == Status.OUT_OF_MEMORY:
            return OutOfMemory(message)
        error = make_error(kind, message)
        if isinstance(error, InternalError):
            raise ValueError(f"an error of type {kind!r}")
        return error

    async def _receive_pixels(self, height: int, width: int) -> NDArray[np.uint8]:
        pixels = np.empty((height, width, 3), np.uint8)
        await self._fill(pixels.data.cast("B"))
        return pixels

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
        self.leaving = True
        self._process.kill()

    async def end(self) -> None:
        """Kill the process and wait until it is gone."""
        self.kill()
        await self._ended.wait()
        async with self._in_use:  # a caller that waits for a reply sees the end of the stream first
            self._connection.close()


def _spawn(connection: socket.socket) -> subprocess.Popen[bytes]:
    """A new program, because a fork of this threaded process could deadlock, with a bare
    environment, because this process may have its keys there."""
    return subprocess.Popen(
        (sys.executable, *PROGRAM),
        stdin=connection.fileno(),
        stdout=subprocess.DEVNULL,
        env=_environment(),
        start_new_session=True,
    )


def _environment() -> dict[str, str]:
    inherited = {
        name: os.environ[name] for name in ("LD_LIBRARY_PATH", "LANG") if name in os.environ
    }
    return inherited | {
        "PYTHONPATH": os.pathsep.join(sys.path),
        "OPENBLAS_NUM_THREADS": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
