"""Permits bound how many requests, and how many bytes, may wait in the queue at once."""

from collections import defaultdict
from collections.abc import Callable, Iterable

from service.engine.price import price_class

BYTES_PER_PERMIT = 4 * 2**20
"""The size of a photograph. Larger uploads use bytes that smaller ones leave."""


class Permit:
    """A place of `caller` in the queue, held from before decoding until the batch begins.

    `since` is the instant at which it was taken, `waited` the seconds from submission to the
    beginning of the batch, known from then on. `price` is that of a typical request until the
    request is `priced`.
    """

    def __init__(
        self, size_bytes: int, since: float, release: Callable[["Permit"], None], caller: str = ""
    ) -> None:
        self.size_bytes = size_bytes
        self.since = since
        self.caller = caller
        self.price = 1.0
        self.priced = False
        self.waited = 0.0
        self._release = release

    def release(self) -> None:
        """Give the permit back. May be called again."""
        self._release(self)


class Permits:
    """The permits of a queue of `size` requests.

    All permits of one caller hold at most `BYTES_PER_PERMIT` for each of `size`, or `largest` bytes
    if that is more, so that an empty queue admits any request. `changed` is called after each
    change.

    A full queue still admits a caller that holds less than its share: the bound divided by the
    number of callers. So the queue exceeds its bounds by at most such shares.
    """

    def __init__(self, size: int, largest: int, changed: Callable[[], None]) -> None:
        self._max_bytes = max(largest, size * BYTES_PER_PERMIT)
        self._changed = changed
        self._held: set[Permit] = set()

    def __len__(self) -> int:
        return len(self._held)

    @property
    def bytes(self) -> int:
        return sum(permit.size_bytes for permit in self._held)

    @property
    def held(self) -> frozenset[Permit]:
        return frozenset(self._held)

    def take(self, size_bytes: int, now: float, limit: int, caller: str = "") -> Permit | None:
        """A permit, or None if there is no room among `limit` places or in bytes."""
        own = [permit for permit in self._held if permit.caller == caller]
        callers = len({permit.caller for permit in self._held} | {caller})
        own_bytes = sum(permit.size_bytes for permit in own)
        for total, mine, size, bound in (
            (len(self._held), len(own), 1, limit),
            (self.bytes, own_bytes, size_bytes, self._max_bytes),
        ):
            if total + size > bound and (mine + size) * callers > bound:
                return None
        permit = Permit(size_bytes, now, self._release, caller)
        self._held.add(permit)
        self._changed()
        return permit

    def _release(self, permit: Permit) -> None:
        self._held.discard(permit)
        self._changed()


def count_ahead(caller: str, cost: float, others: Iterable[Permit]) -> tuple[float, float, int]:
    """The work ahead of a request that costs `cost`, as sums of prices.

    Returns what is ahead of the same caller, where much more expensive requests are overtaken; the
    turns of the other callers, each as much work as the caller itself has, or what there is; and
    how many callers take turns.
    """
    works: defaultdict[str, float] = defaultdict(float)
    for other in others:
        if other.caller != caller or price_class(other.price) <= price_class(cost):
            works[other.caller] += other.price
    own = works.pop(caller, 0.0)
    return own, sum(min(own + cost, work) for work in works.values()), 1 + len(works)
