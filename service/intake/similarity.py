"""Detect keys that send many slightly changed versions of an image, as query attacks do.

Each image leaves a fingerprint: random projections of its coarse colors, rounded to codes, which is
locality-sensitive hashing for Euclidean distance (Datar et al., SCG 2004). The smaller the root
mean squared difference of two images, the more codes they share. The projections are secret and
kept in memory only, so a fingerprint reveals nothing about its image and an attacker cannot aim at
a collision. An attacker can still evade them, for example by shifting the image; this makes attacks
more expensive and visible, no more. Memory is bounded in images, keys and time.
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
from service.messages import Task
from service.settings import Settings
from service.telemetry.metrics import NEAR, Metrics

GRID = 16  # cells per side that an image is averaged to
ROWS = 8  # rows of pixels per cell that are read, at least, if there are as many
CODES = 128  # per fingerprint
WIDTH = 32.0  # gray levels (of 255) that share a code
RECENT = 1024  # images remembered per key
CALLERS = 256  # most recently used keys that are remembered
WINDOW = 3600.0  # seconds


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """`codes`, uint8 [CODES], are similar for similar images; `exact` is equal for equal
    files whose views are drawn and read alike."""

    codes: NDArray[np.uint8]
    exact: np.uint64


def describe_draws(task: Task) -> bytes:
    """What decides which views of an image count, except its pixels.

    Not the labels: asking about other labels draws no other views. Not the deadline: a client that
    tries again has less time left.
    """
    return repr((task.method, task.steps, task.views, task.readout, task.seed)).encode()


class _Recent:
    """A ring buffer of one caller's fingerprints."""

    def __init__(self) -> None:
        self._codes = np.zeros((RECENT, CODES), np.uint8)
        self._exact = np.zeros(RECENT, np.uint64)
        self._times = np.full(RECENT, -np.inf)
        self._next = 0

    def add(self, fingerprint: Fingerprint, now: float) -> None:
        place, self._next = self._next, (self._next + 1) % RECENT
        self._codes[place], self._exact[place], self._times[place] = (
            fingerprint.codes,
            fingerprint.exact,
            now,
        )

    def compare(
        self, fingerprint: Fingerprint, now: float
    ) -> tuple[bool, NDArray[np.float64], NDArray[np.float64]]:
        """Whether the same file with the same draws arrived within the window; and for each image
        in it, the share of equal codes and the time of arrival."""
        fresh = self._times > now - WINDOW
        equal = self._codes[fresh] == fingerprint.codes
        shares = equal.sum(axis=1, dtype=np.uint8) / CODES  # fits into a byte, which sums fastest
        return bool((self._exact[fresh] == fingerprint.exact).any()), shares, self._times[fresh]


class Similarity:
    """Keeps fingerprints by caller, measures similarity, and throttles if the operator wants it."""

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

    def fingerprint(self, image: NDArray[np.uint8], file: bytes, draws: bytes = b"") -> Fingerprint:
        """The fingerprint of an image, uint8 RGB [height, width, 3]; retries are recognized by its
        file and its draws, as `describe_draws` gives them. Thread-safe."""
        rows = np.ascontiguousarray(image[:: max(1, len(image) // (GRID * ROWS))])
        # `reducing_gap` makes this two passes, the first a cheap one by integer factors.
        cells = Image.fromarray(rows).resize((GRID, GRID), Image.Resampling.BOX, reducing_gap=2.0)
        levels = self._directions @ np.asarray(cells, np.float32).ravel() + self._offsets
        codes = np.floor(levels / WIDTH).astype(np.int64).astype(np.uint8)
        # With its length before it, no other split of the same bytes has this digest.
        digest = hashlib.blake2b(len(draws).to_bytes(8), key=self._secret, digest_size=8)
        digest.update(draws)
        digest.update(file)
        return Fingerprint(codes, np.frombuffer(digest.digest(), np.uint64)[0])

    def check(self, caller: str, fingerprint: Fingerprint) -> None:
        """Remember an image. Raises RateLimited if too many similar ones came within the window.

        The same file with the same draws is a retry, which is not measured, refused or remembered.
        With another method, number of views or steps, or readout, a file counts as a similar one:
        other views of it count, so the answers differ like several draws.
        """
        now = self._clock()
        recent = self._callers.pop(caller, None) or _Recent()
        self._callers[caller] = recent  # at the end: most recently used
        if len(self._callers) > CALLERS:
            self._callers.popitem(last=False)
        retry, shares, times = recent.compare(fingerprint, now)
        if retry:
            return
        self._metrics.query_similarity.observe(shares.max(initial=0.0))
        near = np.sort(times[shares > NEAR])
        if self._limit and len(near) >= self._limit:
            self._metrics.rejected.labels("similar").inc()
            wait = float(near[-self._limit]) + WINDOW - now
            raise RateLimited(
                "This key sent too many images that are similar to this one.", retry_after=wait
            )
        recent.add(fingerprint, now)
