"""The queue counts work: expensive requests are refused in time, and callers share the rest."""

import asyncio
import contextlib
from dataclasses import replace

import numpy as np
import pytest

from service.engine.permits import BYTES_PER_PERMIT
from service.errors import QueueFull
from service.messages import Answer, Task
from tests.fake_worker import READY, FakeWorker, answer
from tests.service.engine.harness import by_hand, now, open_engine, reserved, virtual

pytestmark = pytest.mark.alone


def slow_for_many_labels(batch: list[Task]) -> float:
    return sum(9.0 if len(task.labels) > 100 else 0.1 for task in batch)


@pytest.mark.parametrize("light", ["heavy", "light"], ids=["one caller", "two callers"])
@pytest.mark.parametrize("same_views", [False, True])
def test_expensive_requests_are_429_and_a_cheap_one_waits_for_one_of_them_at_most(
    light: str, same_views: bool
) -> None:
    @virtual
    async def scenario() -> None:
        worker = FakeWorker(seconds=slow_for_many_labels)
        async with open_engine(worker) as harness:
            for _ in range(20):  # the mean forgets its first guess
                await harness.ask(heavy=True, caller="heavy")
            began = now()
            heavy = [harness.asking(heavy=True, caller="heavy") for _ in range(16)]
            await asyncio.sleep(2.0)
            assert harness.metric("queue_seconds_expected") == pytest.approx(2 * 9.0, rel=0.05)
            cheap = [
                harness.asking(str(i), caller=light, views=64 if same_views else 4)
                for i in range(10)
            ]
            await asyncio.gather(*cheap)
            assert now() - began == pytest.approx(9.0 + 10 * 0.1, abs=0.05)
            outcomes = await asyncio.gather(*heavy, return_exceptions=True)
            refused = [outcome for outcome in outcomes if isinstance(outcome, QueueFull)]
            assert len(refused) == 13  # one runs, and two end within half of the timeout
            waits = [refusal.retry_after for refusal in refused]
            assert waits == sorted(waits)
            assert waits[0] == pytest.approx(4 * 9.0 - 30, abs=2.0)
            assert waits[-1] > waits[0] + 11 * 9.0
            assert sum(isinstance(outcome, Answer) for outcome in outcomes) == 3

    scenario()


@virtual
async def test_an_expensive_request_runs_alone_and_cheap_ones_together():
    worker = FakeWorker(ready=replace(READY, max_batch_tokens=10**6, typical_seconds=0.01))
    async with open_engine(worker) as harness:
        asked = [harness.ask(str(i), heavy=i < 2, views=64) for i in range(5)]
        await asyncio.gather(*asked)
        batches = sorted([len(task.labels) for task in batch] for batch in worker.batches)
        assert batches == [[2, 2, 2], [1000], [1000]]


@virtual
async def test_cheap_batches_do_not_make_an_expensive_request_look_slow():
    worker = FakeWorker(seconds=lambda batch: 5.0 if len(batch[0].labels) > 100 else 0.1)
    async with open_engine(worker) as harness:
        for _ in range(3):
            await harness.ask(heavy=True)
            for _ in range(5):
                await harness.ask()
        await asyncio.gather(*(harness.ask(heavy=True) for _ in range(5)))  # 25 s, not minutes


@virtual
async def test_a_lone_request_is_admitted_whatever_it_costs():
    worker = FakeWorker(seconds=lambda batch: 50.0)
    async with open_engine(worker, request_timeout_ms=1000) as harness:
        for _ in range(3):
            await harness.ask(heavy=True)
        running = harness.asking(heavy=True)
        await asyncio.sleep(0.1)
        with pytest.raises(QueueFull):
            await harness.ask(heavy=True)
        assert isinstance(await harness.ask(timeout=200), Answer)  # what is cheap overtakes
        await running


@virtual
async def test_the_turns_of_other_callers_count():
    worker = FakeWorker(seconds=lambda batch: 7.0)
    async with open_engine(worker) as harness:
        await harness.measure_pace()
        asked = [harness.asking(heavy=True, caller=caller) for caller in "aaaaabbb"]
        outcomes = await asyncio.gather(*asked, return_exceptions=True)
        refused = [isinstance(outcome, QueueFull) for outcome in outcomes]
        # The turn of a's fifth would end after 5 * 7 s, that of b's third after 6 * 7 s.
        assert refused == [False] * 4 + [True] + [False] * 2 + [True]


@virtual
async def test_a_caller_takes_no_more_turns_than_it_has_work():
    worker = FakeWorker(seconds=slow_for_many_labels)
    async with open_engine(worker) as harness:
        await harness.measure_pace()
        cheap = harness.asking(caller="b")
        asked = [harness.asking(heavy=True, caller="a") for _ in range(3)]
        outcomes = await asyncio.gather(cheap, *asked, return_exceptions=True)
        assert not any(isinstance(outcome, QueueFull) for outcome in outcomes)


@virtual
async def test_admitted_requests_end_in_time_though_another_caller_takes_turns():
    worker = FakeWorker(seconds=slow_for_many_labels)
    async with open_engine(worker) as harness:
        await harness.measure_pace()

        async def keep_asking() -> None:
            while True:
                with contextlib.suppress(QueueFull):
                    await asyncio.gather(*(harness.ask(heavy=True, caller="b") for _ in range(2)))
                await asyncio.sleep(0.1)

        admitted = [harness.asking(heavy=True, caller="a") for _ in range(16)]
        await asyncio.sleep(0.1)
        other = asyncio.create_task(keep_asking())
        outcomes = await asyncio.gather(*admitted, return_exceptions=True)
        other.cancel()
        assert {type(outcome) for outcome in outcomes} == {Answer, QueueFull}


@virtual
async def test_requests_whose_clients_leave_do_not_make_others_look_quick():
    worker = FakeWorker(seconds=slow_for_many_labels)
    async with open_engine(worker) as harness:
        await harness.measure_pace()
        pace = harness.engine._pool.seconds_per_price
        worker.seconds = lambda batch: 0.01  # as a worker that stops when nobody waits
        for _ in range(20):
            leaving = harness.asking(heavy=True)
            await asyncio.sleep(0.005)
            leaving.cancel()
            await asyncio.sleep(0.1)
        assert harness.engine._pool.seconds_per_price == pace


@virtual
async def test_answers_cut_short_make_requests_look_slower_but_not_quicker():
    def cut(task: Task) -> Answer:
        return replace(answer(task), truncated="deadline")

    worker = FakeWorker(cut, seconds=lambda batch: 0.001)
    async with open_engine(worker) as harness:
        pace = harness.engine._pool.seconds_per_price
        await harness.ask()
        assert harness.engine._pool.seconds_per_price == pace
        worker.seconds = lambda batch: 10.0
        await harness.ask()
        assert harness.engine._pool.seconds_per_price > 2 * pace


@virtual
async def test_labels_that_were_answered_before_cost_nothing_again():
    labels = tuple(f"{i} {'word ' * 48}" for i in range(1000))
    worker = FakeWorker()

    async with open_engine(worker) as harness:

        async def cost() -> float:
            with reserved(harness.engine, 1) as permit:
                image = np.zeros((1, 1, 3), np.uint8)
                task = Task("x", image, labels, None, "tapt", 1, 16, "all", 0, now() + 60)
                harness.engine.claim(permit, task)
                await harness.engine.submit(permit, task)
                return permit.price

        costs = [await cost(), await cost()]
        worker.die()
        worker.be_ready()
        costs.append(await cost())
        assert costs[0] == costs[2] > 50
        assert costs[1] < 1.0


@virtual
async def test_the_first_pace_is_that_of_the_warm_up():
    worker = FakeWorker(ready=replace(READY, typical_seconds=2.0))
    async with open_engine(worker) as harness:
        with reserved(harness.engine, 1):
            assert harness.metric("queue_seconds_expected") == 2.0


@virtual
async def test_a_queue_that_one_caller_filled_has_a_share_for_another():
    worker = by_hand()
    async with open_engine(worker, max_queue_size=8) as harness:
        worker.be_ready()
        with contextlib.ExitStack() as permits:
            for _ in range(8):
                permits.enter_context(reserved(harness.engine, BYTES_PER_PERMIT, "greedy"))
            with pytest.raises(QueueFull) as refusal:
                harness.engine.reserve(1, "greedy")
            for _ in range(4):
                permits.enter_context(reserved(harness.engine, BYTES_PER_PERMIT, "other"))
            with pytest.raises(QueueFull) as others:
                harness.engine.reserve(1, "other")
        assert others.value.retry_after <= 2 * refusal.value.retry_after
