"""The worker process and the pipe to it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from service.work import Beat, Fatal, Finished, Ready, Settled, Work


@dataclass(frozen=True, slots=True)
class Lost:
    """The worker is gone, and what it ran with it. Another follows unless `restarting` is False."""

    reason: str
    restarting: bool


Event = Ready | Beat | Settled | Finished | Fatal | Lost


class Backend(Protocol):
    """What the engine needs of a worker; the seam at which tests put a fake one."""

    def start(self, deliver: Callable[[Event], None]) -> None:
        """Begin to start up; `deliver` is called on the running event loop with every event."""

    def run(self, batch: list[Work]) -> None:
        """Work on a batch. Settled follows for each request, then Finished; or else Lost."""

    def cancel(self, ids: frozenset[str]) -> None:
        """Nobody waits for these any more; unknown ids are ignored."""

    async def stop(self) -> None:
        """End the worker; nothing is delivered afterwards."""
