"""What one key may ask of the server, at once and over time, so that the others get theirs.

Without keys all clients are one caller and share its limits.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from service.errors import RateLimited
from service.settings import Settings
from service.telemetry.metrics import Metrics


@dataclass(slots=True)
class _Account:
    """Requests under way, and a token bucket: `tokens` are those at the instant `since`."""

    tokens: float
    since: float
    running: int = 0


class Limits:
    """One account a caller; there are no more callers than keys."""

    def __init__(
        self, settings: Settings, metrics: Metrics, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._rate = settings.key_rate
        self._burst = float(settings.key_burst)
        self._concurrency = settings.key_concurrency
        self._metrics = metrics
        self._clock = clock
        self._accounts: dict[str, _Account] = {}

    @contextmanager
    def admit(self, caller: str) -> Iterator[None]:
        """Let a request of this caller run inside. Raises RateLimited, which spends no token."""
        now = self._clock()
        account = self._accounts.setdefault(caller, _Account(self._burst, now))
        if self._concurrency and account.running >= self._concurrency:
            self._metrics.rejected.labels("key_concurrency").inc()
            message = f"This key has {account.running} requests under way already."
            raise RateLimited(message, retry_after=1)
        if self._rate:
            self._spend(account, now)
        account.running += 1
        try:
            yield
        finally:
            account.running -= 1

    def _spend(self, account: _Account, now: float) -> None:
        earned = (now - account.since) * self._rate
        account.tokens = min(self._burst, account.tokens + earned)
        account.since = now
        if account.tokens < 1:
            self._metrics.rejected.labels("key_rate").inc()
            wait = (1 - account.tokens) / self._rate
            raise RateLimited("This key asks too often.", retry_after=wait)
        account.tokens -= 1
