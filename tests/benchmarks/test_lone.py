"""Where a lone request's time goes: stages without gaps, from a server that answers as usual."""

import pytest

from benchmarks.lone import measure, service, split, write
from benchmarks.stamped import STAGES

NAMES = list(STAGES)
STAMPS = [(float(10 * n + place), name) for n in (0, 1) for place, name in enumerate(NAMES[:-1])]


def test_the_stages_are_the_whole_time() -> None:
    first, second = (split((start, start + 9.0), STAMPS) for start in (-0.5, 9.5))
    assert first == {**dict.fromkeys(NAMES, 1000.0), "called": 500.0, "received": 500.0}
    assert sum(second.values()) == 9000
    assert service(second) == 7000
    text = write({"plain": [first] * 3, "tapt": [second] * 4}, "python -m benchmarks.lone")
    assert "| **all but decoding and computing** | 7000.00 | 7000.00 |" in text
    assert "3 requests each" in text


def test_a_request_that_passes_other_stages_is_an_error() -> None:
    with pytest.raises(ValueError, match="a request passed"):
        split((-0.5, 7.5), STAMPS)
    with pytest.raises(ValueError, match="a request passed"):
        split((-0.5, 10.5), STAMPS)


def test_a_server_writes_down_every_stage() -> None:
    found = measure(["plain", "tapt"], 2)
    for spent in found.values():
        assert [list(one) for one in spent] == [NAMES] * 2
        assert all(milliseconds >= 0 for one in spent for milliseconds in one.values())
    assert found["tapt"][0]["computed"] > found["plain"][0]["computed"]
