"""The places in the queue: how many requests, and how many bytes, may wait at once."""

from collections.abc import Callable
from types import TracebackType
from typing import Self

BYTES_PER_PLACE = 4 * 2**20  # a photograph; larger uploads share the room of smaller ones


class Permit:
    """One place, held from before the decoding until the request's batch begins, or it ends.

    Leaving the `with` block gives it back. `since` is the instant it was taken; `waited` the
    seconds from submission to the batch's beginning, known from then on.
    """

    def __init__(self, size_bytes: int, since: float, release: Callable[["Permit"], None]) -> None:
        self.size_bytes = size_bytes
        self.since = since
        self.waited = 0.0
        self._release = release

    def release(self) -> None:
        """Give the place back; again is harmless."""
        self._release(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()


class Permits:
    """All places: `BYTES_PER_PLACE` bytes for each of `places` (one request of `largest` bytes
    always fits into an empty queue). Calls `changed` on each change."""

    def __init__(self, places: int, largest: int, changed: Callable[[], None]) -> None:
        self._room = max(largest, places * BYTES_PER_PLACE)
        self._changed = changed
        self._held: set[Permit] = set()

    def __len__(self) -> int:
        return len(self._held)

    @property
    def bytes(self) -> int:
        return sum(permit.size_bytes for permit in self._held)

    def take(self, size_bytes: int, now: float, places: int) -> Permit | None:
        """A slot, or None when so many places are held now, or all bytes are."""
        if len(self._held) >= places or self.bytes + size_bytes > self._room:
            return None
        permit = Permit(size_bytes, now, self._release)
        self._held.add(permit)
        self._changed()
        return permit

    def _release(self, permit: Permit) -> None:
        self._held.discard(permit)
        self._changed()
