"""When a refused client may come back.

With one shared Retry-After, all refused clients would return at once and most would be refused
again. So each is told a time of its own, after those that were told before it. This is no
reservation: a client that comes earlier is admitted if there is room.
"""

MAX_SECONDS = 900.0
"""Longest time that a client is told. If more are refused than it holds, they share it."""

SPACING = 1.25
"""Times lie this much further apart than the mean time of a request, which varies and grows when
batches are not full."""


class RetryAfter:
    """Spreads the times at which refused clients return."""

    def __init__(self) -> None:
        self._last = float("-inf")

    def assign(self, now: float, wait: float, interval: float) -> float:
        """Seconds from `now` after which to return.

        At the earliest when the queue has drained, in `wait` seconds, and at least SPACING
        times `interval` seconds after the client before.
        """
        seconds = min(max(wait, self._last + SPACING * interval - now), MAX_SECONDS)
        self._last = now + seconds
        return seconds

    def clear(self) -> None:
        """Forget the assigned times. The queue has room again, so they no longer matter."""
        self._last = float("-inf")
