"""Messages arrive as they were sent, whatever their arrays, and a torn one is an error."""

import fcntl
import multiprocessing
import os
import pickle
import sys
import threading
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import pytest

from service.messages import Cancel, Heartbeat, Run, Task
from service.worker import pipe

Ends = tuple["Connection[Any]", "Connection[Any]"]


@pytest.fixture
def ends() -> Iterator[Ends]:
    reading, writing = multiprocessing.Pipe(duplex=False)
    with reading, writing:
        yield reading, writing


def task(id: str, image: Any, view: Any = None) -> Task:
    return Task(id, image, ("cat", "dog"), None, "tapt", 1, 4, "all", 0, 1.0, view=view)


def through(ends: Ends, message: object) -> Any:
    """A message at the other end; sent by a thread, because a pipe holds less than an image."""
    reading, writing = ends
    sender = threading.Thread(target=pipe.send, args=(writing, message))
    sender.start()
    received = pipe.receive(reading)
    sender.join()
    return received


def test_arrays_arrive_as_they_were_sent(ends: Ends) -> None:
    draw = np.random.default_rng(0).integers(0, 256, (1200, 900, 3)).astype(np.uint8)
    images = [draw, draw[::2, ::-1], np.asfortranarray(draw), draw[:0], draw[:1, :1]]
    sent = Run([task(str(n), image, draw[:32, :32]) for n, image in enumerate(images)])
    received = through(ends, sent)
    assert [one.id for one in received.batch] == ["0", "1", "2", "3", "4"]
    for one, image in zip(received.batch, images, strict=True):
        np.testing.assert_array_equal(one.image, image)
        np.testing.assert_array_equal(one.view, draw[:32, :32])
        assert one.labels == ("cat", "dog")
        assert one.image.flags.writeable
    assert through(ends, Heartbeat(0.5, 7)) == Heartbeat(0.5, 7)
    assert through(ends, Cancel(frozenset("ab"))) == Cancel(frozenset("ab"))


def test_the_pickle_holds_no_pixels(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    pickled: list[bytes] = []
    dumps = pickle.dumps

    def watch(*arguments: Any, **options: Any) -> bytes:
        pickled.append(dumps(*arguments, **options))
        return pickled[-1]

    monkeypatch.setattr(pickle, "dumps", watch)
    through(ends, Run([task("a", np.zeros((400, 400, 3), np.uint8))]))
    assert len(pickled) == 1
    assert len(pickled[0]) < 1000


def test_a_message_that_breaks_off_is_an_error(ends: Ends) -> None:
    reading, writing = ends
    message = pickle.dumps(None)
    whole = len(message).to_bytes(8, "little") + message + (100).to_bytes(8, "little")
    writing.send_bytes(whole)
    os.write(writing.fileno(), bytes(99))
    writing.close()
    with pytest.raises(EOFError):
        pipe.receive(reading)
    with pytest.raises(EOFError):
        pipe.receive(reading)


def test_a_pipe_that_nobody_reads_is_an_error(ends: Ends) -> None:
    reading, writing = ends
    reading.close()
    with pytest.raises(OSError, match="Broken pipe"):
        pipe.send(writing, Heartbeat(0.0, 0))


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have pipes of one size")
def test_a_widened_pipe_holds_an_image(ends: Ends) -> None:
    reading, writing = ends
    pipe.widen(writing)
    assert fcntl.fcntl(reading, fcntl.F_GETPIPE_SZ) == pipe.CAPACITY
