"""Messages through a pipe, with the data of their arrays beside the pickle and not in it.

`Connection.send` copies an array several times: into the pickle, out of the received pieces, and
out of the pickle. With out-of-band buffers (PEP 574) the data go from the array into the pipe, and
from the pipe into the new array.
"""

import contextlib
import fcntl
import os
import pickle
import struct
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

CAPACITY = 2**20
"""Bytes that a widened pipe holds, as many as Linux gives to everyone. Through the usual 64 KiB an
image goes piece by piece, and both processes wait for each other each time."""

_SIZE = struct.Struct("<Q")


def widen(pipe: "Connection[Any]") -> None:
    """Let a pipe hold CAPACITY bytes, where the system can."""
    if hasattr(fcntl, "F_SETPIPE_SZ"):  # Linux
        with contextlib.suppress(OSError):  # more than this user's share
            fcntl.fcntl(pipe.fileno(), fcntl.F_SETPIPE_SZ, CAPACITY)


def send(pipe: "Connection[Any]", message: object) -> None:
    """Send a message; `receive` returns an equal one. Raises OSError if the other end is closed."""
    buffers: list[pickle.PickleBuffer] = []
    head = pickle.dumps(message, protocol=5, buffer_callback=buffers.append)
    data = [buffer.raw() for buffer in buffers]
    sizes = b"".join(_SIZE.pack(len(part)) for part in data)
    pipe.send_bytes(_SIZE.pack(len(head)) + head + sizes)
    for part in data:
        while part:
            part = part[os.write(pipe.fileno(), part) :]


def receive(pipe: "Connection[Any]") -> Any:
    """The next message. Raises EOFError or OSError if the other end is closed."""
    whole = memoryview(pipe.recv_bytes())
    (end,) = _SIZE.unpack_from(whole)
    end += _SIZE.size
    head, sizes = whole[_SIZE.size : end], whole[end:]
    buffers = []
    for (size,) in _SIZE.iter_unpack(sizes):
        buffer = np.empty(size, np.uint8)  # unlike a bytearray it is not filled with zeros
        left = buffer.data
        while left:
            count = os.readv(pipe.fileno(), [left])
            if not count:
                raise EOFError
            left = left[count:]
        buffers.append(buffer)
    return pickle.loads(head, buffers=buffers)
