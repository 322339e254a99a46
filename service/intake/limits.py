"""Per-key limits on concurrency and rate, so that one key cannot crowd out the others.

Without keys all clients share one account.
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
    """Requests in progress, and a token bucket that held `tokens` at the instant `since`."""

    tokens: float
    since: float
    running: int = 0


class Limits:
    """One account per caller; there are at most as many callers as keys."""

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
        """Count a request of this caller while the block runs.

        Raises RateLimited; a refused request spends no token. An admitted one spends one, and the
        rest of its price by `charge`, once that is known.
        """
        now = self._clock()
        account = self._accounts.setdefault(caller, _Account(self._burst, now))
        if self._concurrency and account.running >= self._concurrency:
            self._metrics.rejected.labels("key_concurrency").inc()
            message = f"This key already has {account.running} requests in progress."
            raise RateLimited(message, retry_after=1)
        if self._rate:
            self._spend_token(account, now)
        account.running += 1
        try:
            yield
        finally:
            account.running -= 1

    def charge(self, caller: str, price: float) -> None:
        """Charge an admitted request what its price exceeds one token by.

        The bucket may be overdrawn: this request goes on, and the next is admitted when the bucket
        holds a token again.
        """
        self._accounts[caller].tokens -= max(0.0, price - 1)

    def _spend_token(self, account: _Account, now: float) -> None:
        earned = (now - account.since) * self._rate
        account.tokens = min(self._burst, account.tokens + earned)
        account.since = now
        if account.tokens < 1:
            self._metrics.rejected.labels("key_rate").inc()
            wait = (1 - account.tokens) / self._rate
            raise RateLimited("This key sends requests too often.", retry_after=wait)
        account.tokens -= 1
