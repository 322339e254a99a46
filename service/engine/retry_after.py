"""When a refused client may come back: each has a turn of its own, behind those told before it.

Were everybody told how long the queue takes to drain, all would return together, and most would be
refused again. A turn is no reservation: who comes earlier, or is new, is let in where there is
room.
"""

LONGEST = 900.0
"""Seconds that nobody is told to exceed. Behind more refused requests than this holds, a turn is no
longer sure."""


SPACING = 1.25
"""Turns lie further apart than a request takes on average: that time varies, and grows where
batches are no longer full."""


class RetryAfter:
    """The turns given so far; what counts of them is the last."""

    def __init__(self) -> None:
        self._last = float("-inf")

    def book(self, now: float, wait: float, pace: float) -> float:
        """Seconds after `now` at which to return: when the queue has drained, in `wait` seconds,
        and every turn given before has had somewhat more than its `pace` seconds."""
        seconds = min(max(wait, self._last + SPACING * pace - now), LONGEST)
        self._last = now + seconds
        return seconds

    def clear(self) -> None:
        """Forget the turns: there is room, so those who were to use it are done or do not come."""
        self._last = float("-inf")
