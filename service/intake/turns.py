"""A few things that many callers want, handed out in turns."""

import asyncio
from collections import deque
from typing import Generic, TypeVar

T = TypeVar("T")


class Turns(Generic[T]):
    """Things that are taken one at a time and put back.

    Who waits is served by start-time fair queueing, as in `service.engine.scheduler`: the caller
    that was charged least goes next. A caller is charged in advance, by what a turn may cost at
    most, and refunded afterwards.
    """

    def __init__(self) -> None:
        self._free: deque[T] = deque()
        self._waiting: dict[str, deque[tuple[asyncio.Future[T], float]]] = {}
        self._charged: dict[str, float] = {}
        self._virtual = 0.0  # what had been charged to the caller whose turn it was last

    async def take(self, caller: str, charge: float) -> T:
        """Wait for a turn. Raises what `fail` was given meanwhile."""
        if caller not in self._waiting:
            # A caller gains nothing by having been idle.
            self._charged[caller] = max(self._charged.get(caller, 0.0), self._virtual)
        turn: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(caller, deque()).append((turn, charge))
        self._hand_out()
        try:
            return await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled() and not turn.exception():
                self.refund(caller, charge)
                self.put(turn.result())
            raise

    def put(self, thing: T) -> None:
        """Add a thing, or give one back."""
        self._free.append(thing)
        self._hand_out()

    def refund(self, caller: str, charge: float) -> None:
        """Charge a caller less, for a turn that cost less than it might have."""
        self._charged[caller] -= charge

    def fail(self, error: Exception) -> None:
        """End the waiting of everybody, with an error."""
        for waiting in self._waiting.values():
            for turn, _ in waiting:
                if not turn.done():
                    turn.set_exception(error)
        self._waiting.clear()

    def _hand_out(self) -> None:
        while self._free and self._waiting:
            caller = min(self._waiting, key=self._charged.__getitem__)
            turn, charge = self._waiting[caller].popleft()
            if not self._waiting[caller]:
                del self._waiting[caller]
            if turn.done():  # nobody waits any more
                continue
            self._virtual = max(self._virtual, self._charged[caller])
            self._charged[caller] += charge
            turn.set_result(self._free.popleft())
