"""The inside of a decoder process: one image after the other, under limits the kernel enforces.

`python -m service.intake.decoder` serves the socket that is its standard input until the other end
closes. It imports neither torch nor a web framework. `decoders.py` is the other end.

A request is a `REQUEST`, a `Preprocessing` as JSON (or nothing), and the file. A reply is a `REPLY`
and its body: the pixels and the view of a `DecodedImage`, or an error's type and message. The first
reply comes unasked.
"""

import contextlib
import ctypes
import json
import os
import resource
import signal
import socket
import struct
import sys
from collections.abc import Iterator
from enum import IntEnum
from io import BytesIO

from PIL import ExifTags, Image

from models.images.decode import FORMATS, HEIC, DecodedImage
from models.images.preprocess import Preprocessing
from service.errors import ServiceError
from service.intake.decode import OutOfMemory, decode
from service.malloc import keep_freed_memory, use_one_heap

REQUEST = struct.Struct(">QQQQd??")
"""Bytes of the JSON and of the file; limits in pixels, bytes of memory and seconds of processor
time; whether to refuse at once an image that is expected to need more memory; and whether more than
view 0 is wanted."""

REPLY = struct.Struct(">B?QIII")
"""A `Status`, whether the process ends after this reply, bytes of the body, height and width of the
pixels, and the side of the view, 0 without one."""


class Status(IntEnum):
    """What the body of a reply is: nothing (the process is warm), pixels, or one of two errors."""

    WARM = 0
    PIXELS = 1
    ERROR = 2
    OUT_OF_MEMORY = 3


RETAINED = 40 * 2**20
"""Bytes of address space that a process may keep between images; with more it ends. Ordinary
images leave less, with the thresholds in `malloc.py`."""

NOBODY = 65534

DESCRIPTORS = 4
"""Socket, standard output and error, `/proc/self/statm`: no file and no connection besides."""

_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS = 1, 38  # names of <linux/prctl.h>


def main() -> None:
    """Serve the socket at standard input."""
    # A signal to the whole group is for the API process, which closes the socket in its own time.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    with socket.socket(fileno=sys.stdin.fileno()) as connection:
        _follow_parent()
        keep_freed_memory()
        use_one_heap()
        _warm_up()
        space = _AddressSpace()
        _drop_rights()
        with contextlib.suppress(OSError):  # the API process is gone
            connection.sendall(REPLY.pack(Status.WARM, False, 0, 0, 0, 0))
            _serve(connection, space)


def _serve(connection: socket.socket, space: "_AddressSpace") -> None:
    base = space.used()
    leaving = False
    while not leaving and (head := _receive(connection, REQUEST.size)):
        described, size, max_pixels, memory, seconds, cautious, keep_pixels = REQUEST.unpack(head)
        preprocessing, file = _receive(connection, described), _receive(connection, size)
        if preprocessing is None or file is None:
            return
        prepared = Preprocessing(**json.loads(preprocessing)) if preprocessing else None
        reply: DecodedImage | ServiceError
        try:
            with _limited(space, memory, seconds):
                reply = decode(
                    file, max_pixels, memory if cautious else None, prepared, keep_pixels
                )
        except ServiceError as error:
            # Nobody knows what a failed allocation left behind in native code.
            leaving = isinstance(error.__cause__, MemoryError)
            # The frames of a traceback hold the file and the pixels.
            error.__cause__ = error.__context__ = error.__traceback__ = None
            reply = error
        del file  # what is held until the next image must not count, nor be held
        leaving = leaving or space.used() > base + RETAINED
        _send(connection, reply, leaving)
        del reply


def _send(connection: socket.socket, reply: DecodedImage | ServiceError, leaving: bool) -> None:
    body: list[bytes | memoryview]
    height = width = side = 0
    if isinstance(reply, ServiceError):
        status = Status.OUT_OF_MEMORY if isinstance(reply, OutOfMemory) else Status.ERROR
        body = [f"{reply.error_type} {reply.message}".encode()]
    else:
        status = Status.PIXELS
        height, width, _ = reply.pixels.shape
        body = [reply.pixels.data.cast("B")]
        if reply.view is not None:
            side = len(reply.view)
            body.append(reply.view.data.cast("B"))
    connection.sendall(REPLY.pack(status, leaving, sum(map(len, body)), height, width, side))
    for part in body:
        connection.sendall(part)


def _receive(connection: socket.socket, size: int) -> bytes | None:
    """Exactly `size` bytes, or None at the end of the stream."""
    buffer = bytearray(size)
    view = memoryview(buffer)
    while view:
        received = connection.recv_into(view)
        if not received:
            return None
        view = view[received:]
    return bytes(buffer)


@contextlib.contextmanager
def _limited(space: "_AddressSpace", memory: int, seconds: float) -> Iterator[None]:
    """Inside, refuse to allocate more than `memory` bytes, where the system tells what is in use,
    and have the kernel end the process after `seconds` of processor time, however deep in native
    code it is."""
    if used := space.used():
        _limit(resource.RLIMIT_AS, used + memory)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        if used:
            _limit(resource.RLIMIT_AS, resource.RLIM_INFINITY)


def _limit(kind: int, soft: int) -> None:
    resource.setrlimit(kind, (soft, resource.getrlimit(kind)[1]))


class _AddressSpace:
    """What this process uses of its address space. Stays readable when no file can be opened."""

    def __init__(self) -> None:
        self._statm: int | None = None
        with contextlib.suppress(OSError):  # where there is no such file
            self._statm = os.open("/proc/self/statm", os.O_RDONLY)

    def used(self) -> int:
        """Bytes; 0 where the system does not tell."""
        if self._statm is None:
            return 0
        return int(os.pread(self._statm, 64, 0).split()[0]) * resource.getpagesize()


def _follow_parent() -> None:
    """End when the API process does, also in the middle of an image (Linux only)."""
    with contextlib.suppress(OSError, AttributeError):
        prctl = ctypes.CDLL(None).prctl
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)


def _warm_up() -> None:
    """Decode a tiny image of each format, because later no module can be imported any more."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    for kind in FORMATS:
        file = BytesIO()
        Image.new("RGB", (8, 8)).save(file, kind, exif=exif, speed=10)
        decode(file.getvalue(), max_pixels=64)


def _drop_rights() -> None:
    """Give up what decoding does not need: files, sockets, and, without HEIC, threads and children.

    The priority stays: beside a busy worker a lower one would let the clock run out for honest
    images.
    """
    # When the machine runs out of memory, the kernel should choose this process.
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as score:
        score.write("1000")
    # Native code reports a client's damaged file there.
    os.dup2(sys.stdout.fileno(), sys.stderr.fileno())
    if os.geteuid() == 0:
        with contextlib.suppress(OSError):  # a container may not know this user
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            _follow_parent()  # the change of user undid it
    limits = {
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_NPROC: 0,
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_NOFILE: DESCRIPTORS,
    }
    if HEIC:
        # libde265 decodes in a thread of its own, and this limit counts threads and processes.
        del limits[resource.RLIMIT_NPROC]
    for kind, most in limits.items():
        resource.setrlimit(kind, (most, most))


if __name__ == "__main__":
    main()
