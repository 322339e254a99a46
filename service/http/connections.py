"""Connections that are waited for only so long, and whose requests end at one place only.

Uvicorn gives a connection its time between two requests, but any time it likes for the head of one,
or to send nothing at all; a thousand such clients would hold all the descriptors of the process.
"""

import asyncio
import resource
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol


class _OneLength(h11.Connection):
    """Refuses a request that gives its body both a length and chunks: h11 would go by the chunks
    and read on behind them, where a proxy that goes by the length still sees the body, so that one
    client could put a request into another's mouth (RFC 9112, section 6.3)."""

    def next_event(self) -> Any:
        event = super().next_event()
        if isinstance(event, h11.Request):
            names = {name for name, _ in event.headers}
            if names.issuperset((b"content-length", b"transfer-encoding")):
                raise h11.RemoteProtocolError("a body of two lengths")
        return event


def limit_connections(patience: float) -> type[H11Protocol]:
    """A protocol for uvicorn that closes a connection which has brought no whole head of a request
    `patience` seconds after it began to wait for one. Bodies have a limit of their own."""

    class _LimitedProtocol(H11Protocol):
        waiting: asyncio.TimerHandle | None = None

        def __init__(self, *arguments: Any, **named: Any) -> None:
            super().__init__(*arguments, **named)
            self.conn = _OneLength(h11.SERVER)

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._wait()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.cycle is not None and not self.cycle.response_complete:
                self._stop_waiting()
            elif self.waiting is None:
                self._wait()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_waiting()
            super().connection_lost(exc)

        def _wait(self) -> None:
            self.waiting = self.loop.call_later(patience, self._give_up)

        def _stop_waiting(self) -> None:
            if self.waiting:
                self.waiting.cancel()
                self.waiting = None

        def _give_up(self) -> None:
            self.waiting = None
            if self.cycle is None or self.cycle.response_complete:
                self.transport.close()

    return _LimitedProtocol


def raise_descriptor_limit() -> None:
    """As many open connections as the system lets this process have."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
