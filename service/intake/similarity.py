"""Does a key send the same picture over and over, a little changed? Attacks by queries do.

Each picture leaves a fingerprint: its coarse colors, projected at random and rounded, which is
locality-sensitive hashing for Euclidean distance (Datar et al., SCG 2004). Two pictures share the
more codes, the smaller the root of their mean squared difference is. The projections are secret
and die with the process, so that a fingerprint tells nobody anything of its picture and an
attacker cannot aim at a collision. An attacker who knows of them can still move the picture about;
this makes attacks dearer and visible, no more. Memory is bounded in pictures, in keys and in time.
"""

import hashlib
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from service.errors import RateLimited
from service.settings import Settings
from service.telemetry.metrics import NEAR, Metrics

GRID = 16  # cells a side that a picture is averaged to
ROWS = 8  # of pixels that are looked at in a cell, at least, where there are so many
CODES = 128  # of a fingerprint
WIDTH = 32.0  # grey levels (of 255) that share a code
RECENT = 1024  # pictures remembered of a key
CALLERS = 256  # keys remembered, those heard last
WINDOW = 3600.0  # seconds


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """`codes`: uint8 [CODES], alike for alike pictures. `exact`: equal for equal files only."""

    codes: NDArray[np.uint8]
    exact: np.uint64


class _Recent:
    """The fingerprints of one caller, as a ring."""

    def __init__(self) -> None:
        self._codes = np.zeros((RECENT, CODES), np.uint8)
        self._exact = np.zeros(RECENT, np.uint64)
        self._times = np.full(RECENT, -np.inf)
        self._next = 0

    def add(self, print: Fingerprint, now: float) -> None:
        place, self._next = self._next, (self._next + 1) % RECENT
        self._codes[place], self._exact[place], self._times[place] = print.codes, print.exact, now

    def compare(
        self, print: Fingerprint, now: float
    ) -> tuple[bool, NDArray[np.float64], NDArray[np.float64]]:
        """Whether this very file came within the window; and of each picture that did, the
        share of equal codes and the instant it came."""
        fresh = self._times > now - WINDOW
        equal = self._codes[fresh] == print.codes
        shares = equal.sum(axis=1, dtype=np.uint8) / CODES  # a byte holds CODES, and sums fastest
        return bool((self._exact[fresh] == print.exact).any()), shares, self._times[fresh]


class Similarity:
    """Fingerprints by caller, the metric they raise, and the throttle where the operator set it."""

    def __init__(
        self, settings: Settings, metrics: Metrics, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._limit = settings.key_similar_per_hour
        self._metrics = metrics
        self._clock = clock
        self._secret = secrets.token_bytes(32)
        source = np.random.default_rng(secrets.randbits(256))
        inputs = 3 * GRID * GRID
        directions = source.standard_normal((CODES, inputs)) / np.sqrt(inputs)
        self._directions = directions.astype(np.float32)
        self._offsets = source.uniform(0, WIDTH, CODES).astype(np.float32)
        self._callers: OrderedDict[str, _Recent] = OrderedDict()

    def fingerprint(self, image: NDArray[np.uint8], file: bytes) -> Fingerprint:
        """Of uint8 RGB [height, width, 3] and the file it came in, which is the cheaper of the two
        to tell a retry by. May run on any thread."""
        rows = np.ascontiguousarray(image[:: max(1, len(image) // (GRID * ROWS))])
        # Averaged in two passes, of which the first is the cheap one of whole factors.
        cells = Image.fromarray(rows).resize((GRID, GRID), Image.Resampling.BOX, reducing_gap=2.0)
        levels = self._directions @ np.asarray(cells, np.float32).ravel() + self._offsets
        codes = np.floor(levels / WIDTH).astype(np.int64).astype(np.uint8)
        digest = hashlib.blake2b(file, key=self._secret, digest_size=8).digest()
        return Fingerprint(codes, np.frombuffer(digest, np.uint64)[0])

    def check(self, caller: str, print: Fingerprint) -> None:
        """Remember a picture. Raises RateLimited when too many like it came within the window.

        The very same file again is a retry: neither measured, refused nor remembered twice.
        """
        now = self._clock()
        recent = self._callers.pop(caller, None) or _Recent()
        self._callers[caller] = recent  # at the end: heard last
        if len(self._callers) > CALLERS:
            self._callers.popitem(last=False)
        again, shares, times = recent.compare(print, now)
        if again:
            return
        self._metrics.query_similarity.observe(shares.max(initial=0.0))
        near = np.sort(times[shares > NEAR])
        if self._limit and len(near) >= self._limit:
            self._metrics.rejected.labels("similar").inc()
            wait = float(near[-self._limit]) + WINDOW - now
            raise RateLimited("This key sent too many images like this one.", retry_after=wait)
        recent.add(print, now)
