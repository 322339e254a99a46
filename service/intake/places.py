"""A few places for work that takes long, shared among callers."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass


class Full(Exception):
    """No place is left, or another caller took this one."""


@dataclass(slots=True, eq=False)
class _Place:
    caller: str
    work: asyncio.Timeout
    evicted: bool = False


class Places:
    """At most `count` places. When all are held, a caller that holds at least two fewer than the
    one that holds most takes a place of that one's: the last taken, where least work is lost."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._held: list[_Place] = []

    @asynccontextmanager
    async def hold(self, caller: str) -> AsyncIterator[None]:
        """Hold a place while the block runs. Raises Full."""
        self._make_room(caller)
        try:
            async with asyncio.timeout(None) as work:
                place = _Place(caller, work)
                self._held.append(place)
                try:
                    yield
                finally:
                    if not place.evicted:
                        self._held.remove(place)
        except TimeoutError:
            if not place.evicted:
                raise
            raise Full from None

    def _make_room(self, caller: str) -> None:
        if len(self._held) < self._count:
            return
        held = Counter(place.caller for place in self._held)
        richest, most = held.most_common(1)[0]
        if most - held[caller] < 2:
            raise Full
        victim = next(place for place in reversed(self._held) if place.caller == richest)
        self._held.remove(victim)
        victim.evicted = True
        victim.work.reschedule(asyncio.get_running_loop().time())
