"""The memory that unfinished bodies may take together, shared among callers.

When it runs short, the newcomer is not refused: the caller that holds the most gives up its upload
that has held the most for the longest. So uploads that are begun and left idle cost their sender
only.
"""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from service.errors import QueueFull, UploadTimeout
from service.telemetry.metrics import Metrics

CAPACITY = 16
"""Memory for unfinished bodies, in multiples of the largest body."""

MAX_UPLOADS = 2048
"""Unfinished bodies at once, however small: each counts for at least this part of the capacity.
Fewer than there may be connections, so that slow uploads cannot take them all."""


class Upload:
    """One body while it arrives. `size` is what it counts for: its bytes so far, or its share of
    the capacity if that is more."""

    def __init__(self, uploads: "Uploads", caller: str, deadline: asyncio.Timeout) -> None:
        self.caller = caller
        self.size = 0
        self._received = 0
        self.started = uploads.clock()
        self.evicted = False
        self._uploads = uploads
        self._deadline = deadline

    def grow(self, count: int) -> None:
        """Count bytes that have arrived. Raises QueueFull if this upload is evicted for them."""
        self._received += count
        more = max(self._received, self._uploads.share) - self.size
        if more > 0 and not self.evicted:
            self.size += more
            self._uploads.make_room(more)
        if self.evicted:
            raise self.refusal

    def evict(self) -> None:
        self.evicted = True
        self._deadline.reschedule(asyncio.get_running_loop().time())

    @property
    def refusal(self) -> QueueFull:
        return QueueFull("Too much is being uploaded at once.", retry_after=1)


class Uploads:
    """All uploads under way, at most `capacity` bytes of them together."""

    def __init__(
        self, capacity: int, metrics: Metrics, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.clock = clock
        self._capacity = capacity
        self.share = capacity // MAX_UPLOADS
        self._metrics = metrics
        self._uploads: set[Upload] = set()
        self.bytes = 0  # held now, without those of evicted uploads

    @asynccontextmanager
    async def receive(self, caller: str, seconds: float) -> AsyncIterator[Upload]:
        """Register an upload while the block runs, at most for so many seconds.

        Raises UploadTimeout at the end of the time, QueueFull if the upload is evicted.
        """
        try:
            async with asyncio.timeout(seconds) as deadline:
                upload = Upload(self, caller, deadline)
                self._uploads.add(upload)
                try:
                    upload.grow(0)
                    yield upload
                finally:
                    self._forget(upload)
        except TimeoutError:
            if upload.evicted:
                raise upload.refusal from None
            raise UploadTimeout("The body did not arrive in time.") from None

    def make_room(self, count: int) -> None:
        """Count bytes that have arrived, and evict uploads until the rest fits."""
        self.bytes += count
        while self.bytes > self._capacity:
            held: Counter[str] = Counter()
            for upload in self._uploads:
                held[upload.caller] += upload.size
            most = max(held.values())
            now = self.clock()
            victim = max(
                (upload for upload in self._uploads if held[upload.caller] == most),
                key=lambda upload: (upload.size * (now - upload.started), upload.size),
            )
            self._forget(victim)
            self._metrics.rejected.labels("uploads").inc()
            victim.evict()

    def _forget(self, upload: Upload) -> None:
        if upload in self._uploads:
            self._uploads.remove(upload)
            self.bytes -= upload.size
