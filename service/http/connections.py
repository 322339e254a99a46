"""What one connection may cost: time to send a request, time to take an answer, parsing, room.

Uvicorn and h11 parse all that a read brings at once, wait without limit for a client that never
reads, and keep a connection open until a refused body has arrived. Each of these lets one client
keep the event loop, or the process's descriptors, from everybody else.
"""

import asyncio
import contextlib
import logging
import resource
import time
from collections import deque
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

SLICE = 2048
"""Bytes given to the parser at once, unless they belong to a body of known length, which costs the
same however long it is."""

COSTLY = 64
"""Parser events in a slice. A body in chunks smaller than 32 bytes has more."""

AHEAD = 2**16
"""Bytes that a client may send ahead of the answer it waits for (pipelining)."""

LINGER = 5.0
"""Seconds for which the rest of a refused body is discarded before the connection is closed. Closed
at once, the system would reset the connection, and the client might never see the refusal."""

UNLIMITED = 10_240
"""Descriptors to count on where the system reports no limit. macOS, which reports none, allows
these (`OPEN_MAX`) and refuses an infinite soft limit."""

DISCARDED = 2**24
"""Bytes of a refused body that are discarded at most. Of more, nothing is read."""

BACKLOG = 128
"""Connections accepted at once, before any of them can be counted."""

MAX_CONNECTIONS = 4096
"""Open connections at most: with a head that is not complete, one takes about 35 KB."""

RESERVED = 64
"""Descriptors for everything but connections: pipes, files, processes that are being started."""

QUIET = 60.0  # seconds between two warnings of full connections
CLOSE = (b"connection", b"close")

log = logging.getLogger("tapt.connections")


class _Parser(h11.Connection):
    """Counts its events, and refuses a body with both a length and chunks: h11 would go by the
    chunks, where a proxy in front may go by the length, so that one client could put a request into
    another's mouth (request smuggling; RFC 9112, section 6.3)."""

    events = 0
    chunked = False

    def next_event(self) -> Any:
        event = super().next_event()
        self.events += 1
        if isinstance(event, h11.Request):
            names = {name for name, _ in event.headers}
            self.chunked = b"transfer-encoding" in names
            if self.chunked and b"content-length" in names:
                raise h11.RemoteProtocolError("a body of two lengths")
        return event


class _Shared:
    """What the connections of one server share: their limit, and turns at costly parsing."""

    def __init__(self, max_connections: int) -> None:
        self.max_connections = max_connections
        # Those that wait for their client: to send a request, or to take an answer. Oldest first.
        self.idle: dict[_Connection, None] = {}
        self._waiting: deque[_Connection] = deque()
        self._warned = float("-inf")

    def make_room(self, newcomer: "_Connection") -> None:
        """Close the connection that has been idle for the longest, or else the newcomer."""
        victim = next(iter(self.idle), newcomer)
        self.idle.pop(victim, None)
        victim.transport.abort()
        if time.monotonic() > self._warned + QUIET:
            self._warned = time.monotonic()
            log.warning("%d connections are open, the most; idle ones close", self.max_connections)

    def enqueue(self, connection: "_Connection") -> None:
        """Parse on when it is this one's turn: one slice between two turns of the event loop."""
        self._waiting.append(connection)
        if len(self._waiting) == 1:
            connection.loop.call_soon(self._next)

    def _next(self) -> None:
        connection = self._waiting.popleft()
        if self._waiting:
            connection.loop.call_soon(self._next)
        connection.parse_queued()


class _Transport:
    """The connection's transport, as uvicorn is to see it."""

    def __init__(self, transport: asyncio.Transport, connection: "_Connection") -> None:
        self._transport = transport
        self._connection = connection
        self._paused = False  # by uvicorn

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def pause_reading(self) -> None:
        self._paused = True
        self.update_reading()

    def resume_reading(self) -> None:
        self._paused = False
        self.update_reading()

    def update_reading(self) -> None:
        if self._paused or self._connection.queued:
            self._transport.pause_reading()
        else:
            self._transport.resume_reading()

    def is_closing(self) -> bool:
        return self._connection.lingering is not None or self._transport.is_closing()

    def close(self) -> None:
        """Close once what was written is out; with a body on its way, after LINGER seconds."""
        if self._connection.body_missing and self._connection.lingering is None:
            self._connection.linger()
            self.resume_reading()
            self._transport.write_eof()
        else:
            self._transport.close()


class _Connection(H11Protocol):
    """A connection to a client. `limit_connections` sets the class attributes."""

    patience: float
    shared: _Shared
    transport: Any

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.conn = self._parser = _Parser(h11.SERVER)
        self.app = self._close_early(self.app)
        self.queued = False
        self.lingering: asyncio.TimerHandle | None = None
        self._unread = bytearray()
        self._discarded = 0
        self._head: asyncio.TimerHandle | None = None
        self._write: asyncio.TimerHandle | None = None

    @property
    def body_missing(self) -> bool:
        """Whether a request's body has not arrived, or nobody can tell where it ends."""
        return self.conn.their_state in (h11.SEND_BODY, h11.ERROR)

    def connection_made(self, transport: Any) -> None:
        # With a limit of 0, `pause_writing` tells that a client has not taken what was written.
        transport.set_write_buffer_limits(0)
        super().connection_made(_Transport(transport, self))  # type: ignore[arg-type]
        if len(self.connections) > self.shared.max_connections:
            self.shared.make_room(self)
        self._wait_for_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        for timer in (self.lingering, self._write):
            if timer:
                timer.cancel()
        self.shared.idle.pop(self, None)
        self._unread.clear()
        super().connection_lost(exc)

    # Reading.

    def data_received(self, data: bytes) -> None:
        if self.lingering:
            self._discarded += len(data)
            if self._discarded > DISCARDED:
                self.transport.pause_reading()
            return
        self._unread += data
        if self.conn.their_state is h11.DONE and len(self._unread) > AHEAD:
            self.transport.abort()
        elif not self.queued:
            self._parse()

    def parse_queued(self) -> None:
        """Go on after waiting for a turn."""
        self.queued = False
        if not self.transport.is_closing():
            self._parse()
            self.transport.update_reading()

    def _parse(self) -> None:
        """Parse what has arrived, as far as it belongs to the request under way. What is behind it
        waits here, and reading goes on, or nobody would notice that the client has left."""
        while self._unread and self.conn.their_state is not h11.DONE:
            known = self.conn.their_state is h11.SEND_BODY and not self._parser.chunked
            size = len(self._unread) if known else SLICE
            data = bytes(self._unread[:size])
            del self._unread[:size]
            before = self._parser.events
            super().data_received(data)
            if self.transport.is_closing():
                self._unread.clear()
                return
            if self._parser.events - before > COSTLY:
                self.queued = True
                self.transport.update_reading()
                self.shared.enqueue(self)
                break
        if self.conn.their_state is h11.DONE:
            self.flow.resume_reading()
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_waiting()
        elif self._head is None:
            self._wait_for_head()

    def on_response_complete(self) -> None:
        super().on_response_complete()  # may begin with the next of several pipelined requests
        if not self.transport.is_closing():
            if self.cycle.response_complete:
                self.shared.idle[self] = None
            if self._unread and not self.queued:
                self._parse()

    def _should_upgrade(self) -> bool:
        return False  # uvicorn's own logs two lines whenever a client offers to (h2c)

    # Time.

    def _wait_for_head(self) -> None:
        self.shared.idle.setdefault(self)
        self._head = self.loop.call_later(self.patience, self._give_up)

    def _stop_waiting(self) -> None:
        self.shared.idle.pop(self, None)
        if self._head:
            self._head.cancel()
            self._head = None

    def _give_up(self) -> None:
        self._head = None
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._write = self.loop.call_later(self.patience, self.transport.abort)
        self.shared.idle.setdefault(self)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._write:
            self._write.cancel()
            self._write = None
        if self.cycle is not None and not self.cycle.response_complete:
            self.shared.idle.pop(self, None)

    # The end.

    def _close_early(self, app: Any) -> Any:
        """Close the connection after an answer that did not wait for the body."""

        async def call(scope: Any, receive: Any, send: Any) -> None:
            async def send_and_close(message: Any) -> None:
                if message["type"] == "http.response.start" and self.body_missing:
                    message["headers"] = [*message.get("headers", ()), CLOSE]
                await send(message)

            await app(scope, receive, send_and_close)

        return call

    def linger(self) -> None:
        """Discard what comes, until the client closes, too."""
        self.lingering = self.loop.call_later(LINGER, self.transport.abort)
        self.shared.idle[self] = None
        self._unread.clear()


def limit_connections(patience: float) -> type[H11Protocol]:
    """A protocol for uvicorn whose connections are bounded.

    `patience` is the time in seconds for the head of a request to arrive, counted from when the
    connection began to wait for one, and for an answer to be taken. Bodies have a limit of their
    own. There are at most MAX_CONNECTIONS, or as many as the limit of descriptors allows now.
    """
    descriptors = _finite(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    most = min(MAX_CONNECTIONS, max(descriptors - RESERVED - BACKLOG, descriptors // 4))
    return type("Connection", (_Connection,), {"patience": patience, "shared": _Shared(most)})


def raise_descriptor_limit() -> None:
    """Allow as many open connections as the system lets this process have. Where it refuses, the
    limit stays as it is."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if _finite(soft) < _finite(hard):
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (_finite(hard), hard))


def _finite(limit: int) -> int:
    return UNLIMITED if limit == resource.RLIM_INFINITY else limit
