"""What the benchmark of attacks by queries says of the throttle, against the throttle itself."""

import numpy as np
import pytest

from benchmarks.queries import throttled_hours
from service.errors import RateLimited
from service.intake.similarity import CODES, WINDOW, Fingerprint, Similarity
from service.settings import Settings
from service.telemetry.metrics import Metrics


@pytest.mark.parametrize(("queries", "throttle"), [(1, 5), (5, 5), (6, 5), (15, 5), (16, 5)])
def test_whoever_waits_as_told_takes_the_hours_that_are_told(queries: int, throttle: int) -> None:
    now = 0.0
    settings = Settings(key_similar_per_hour=throttle)
    similarity = Similarity(settings, Metrics(), lambda: now)
    for number in range(queries):
        alike = Fingerprint(np.zeros(CODES, np.uint8), np.uint64(number))
        try:
            similarity.check("a", alike)
        except RateLimited as refusal:
            now += refusal.retry_after or 0.0
            similarity.check("a", alike)
    assert now / WINDOW == pytest.approx(throttled_hours(queries, throttle))
