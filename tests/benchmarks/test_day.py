"""The simulated day, and what one API process carries."""

from dataclasses import replace

import pytest

from benchmarks import day, front

PLAN = day.Plan(peak=1000, throughput=8, target=1.0, floor=0.5, most=1.8, start=120, admitted=30)


def test_load_peaks_when_the_zone_fails_and_is_a_third_at_night() -> None:
    assert PLAN.load(day.FAILS_AT) == pytest.approx(1000)
    assert PLAN.load(day.FAILS_AT - 12 * day.HOUR) == pytest.approx(1000 / 3)


def test_waiting_grows_without_bound_towards_full_load() -> None:
    waits = [day.waiting(load, 16, 8) for load in (10, 64, 120, 127.9)]
    assert waits == sorted(waits)
    assert waits[0] < 1e-3
    assert waits[-1] > 1
    assert day.waiting(128, 16, 8) == float("inf")


def test_a_floor_with_room_for_a_zone_refuses_nothing() -> None:
    found = day.simulate(PLAN)
    assert found.asked == pytest.approx(1000 * day.HOUR * 24 * 2 / 3, rel=1e-3)
    assert found.refused == 0
    assert found.lost > 0
    scarce = day.simulate(replace(PLAN, floor=0.05, start=600))
    assert scarce.refused > 0
    assert scarce.recovered > 0
    assert scarce.replica_hours < found.replica_hours


def test_a_zone_that_returns_costs_the_others_no_replicas() -> None:
    """The autoscaler spreads what it wants over three zones again, and one of them is empty."""
    large = replace(PLAN, peak=100_000, throughput=8.87, floor=0.1)
    assert 0 < day.simulate(large).recovered < day.FAILS_FOR


def test_the_autoscaler_follows_the_queue_within_its_bounds() -> None:
    free = replace(PLAN, floor=0, most=9)
    assert day.want(free, 0, 1.05, 100, 100) == 100  # within the tolerance
    assert day.want(free, 0, 1.2, 100, 100) == 120
    assert day.want(free, 0, 30.0, 100, 100) == 125
    assert day.want(free, 0, 1.2, 100, 130) == 130  # enough are starting
    assert day.want(free, 0, 0.1, 200, 200) == 199
    assert day.want(PLAN, 1000, 0.1, 200, 200) == 199
    assert day.want(PLAN, 1000, 0.1, 100, 100) == 188  # the floor
    assert day.want(PLAN, 0, 30.0, 224, 224) == 225  # the limit


def test_the_api_process_is_measured_with_a_worker_that_answers_at_once() -> None:
    found = front.measure(clients=2, seconds=1.0)
    assert found.failed == 0
    assert found.rate > 5
    assert 0.5 < found.api_ms < 100
    assert found.decode_ms > 0
    text = front.write([found], "python -m benchmarks.front")
    assert f"at most {1000 / found.api_ms:.0f} a second" in text
