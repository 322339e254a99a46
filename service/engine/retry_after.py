"""When a refused client may come back.

With one shared Retry-After, all refused clients would return at once and most would be refused
again. So each is told a time of its own, after those that were told before it. This is no
reservation: a client that comes earlier is admitted if there is room. Clients are spread within
groups (callers, and classes of price), so that one caller's refusals delay no other's.
"""

import math
import random
from collections.abc import Hashable

MAX_SECONDS = 900.0
"""Longest time that a client is told. If more are refused than it holds, they share it."""

SPACING = 1.25
"""Times lie this much further apart than the mean time of a request, which varies and grows when
batches are not full."""


class RetryAfter:
    """Spreads the times at which refused clients return."""

    def __init__(self) -> None:
        self._last: dict[Hashable, float] = {}

    def assign(self, group: Hashable, now: float, wait: float, interval: float) -> float:
        """Seconds from `now` after which to return.

        At the earliest when the queue has drained, in `wait` seconds, and at least SPACING
        times `interval` seconds after the client of its group before.
        """
        last = self._last.get(group, -math.inf)
        seconds = min(max(wait, last + SPACING * interval - now), MAX_SECONDS)
        self._last[group] = now + seconds
        return seconds

    def clear(self, group: Hashable) -> None:
        """Forget a group's times. The queue has room for it again, so they no longer matter."""
        self._last.pop(group, None)


def jitter(seconds: float) -> float:
    """Spread a time by 20 %, at least 1 s, so that clients do not return all at once."""
    return max(1.0, seconds * random.uniform(0.8, 1.2))
