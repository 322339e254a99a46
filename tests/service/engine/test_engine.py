"""Every accepted request settles, exactly once, whatever becomes of it and of its worker."""

import asyncio
import contextlib
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import settings as budget
from hypothesis import strategies as st

from service.engine.engine import GRACE
from service.engine.permits import BYTES_PER_PERMIT
from service.engine.retry_after import MAX_SECONDS
from service.errors import DeadlineExceeded, InternalError, NotReady, QueueFull, ServiceError
from service.messages import Answer, Failure, Finished, Settled, Task
from service.settings import Settings
from tests.fake_worker import READY, FakeWorker, answer
from tests.service.engine.harness import (
    Harness,
    by_hand,
    now,
    open_engine,
    reserved,
    sizes,
    virtual,
)

pytestmark = pytest.mark.alone


@virtual
async def test_an_answer_comes_back_and_is_measured():
    worker = FakeWorker(seconds=lambda batch: 0.5)
    async with open_engine(worker) as harness:
        worker.beat(memory_bytes=7)
        got = await harness.ask(label="attacked")
        assert got == answer(worker.batches[0][0])
        assert now() == pytest.approx(0.001 + 0.005 + 0.5)
        assert harness.metric("batch_size_sum") == 1
        assert harness.metric("batch_views_sum") == 4
        assert harness.metric("queue_seconds_sum") == pytest.approx(0.005)
        assert harness.metric("adaptation_seconds_count", method="tapt", design="vli") == 1
        assert harness.metric("label_changed_total") == 1
        assert harness.metric("suspected_adversarial_total") == 0
        assert harness.metric("truncated_total", reason="cancelled") is None
        assert harness.metric("device_memory_bytes", worker="0") == 7
        assert harness.metric("worker_up", worker="0") == 1


@virtual
async def test_by_default_a_lone_request_starts_at_once_and_others_share_the_next_batch():
    assert Settings().max_queue_delay_ms == 0
    worker = FakeWorker(seconds=lambda batch: 0.5)
    async with open_engine(worker, max_queue_delay_ms=0) as harness:
        began = now()
        lone = harness.asking("lone")
        await asyncio.sleep(0)
        others = [harness.asking(f"other {number}") for number in range(3)]
        await lone
        assert now() - began == pytest.approx(0.5)
        await asyncio.gather(*others)
        assert now() - began == pytest.approx(1.0)
        assert sizes(worker) == [1, 3]


@virtual
async def test_company_shares_a_batch_but_not_across_keys():
    worker = FakeWorker()
    async with open_engine(worker) as harness:
        await asyncio.gather(*(harness.ask(str(i), views=4 + i % 2) for i in range(5)))
        assert sizes(worker) == [3, 2]
        assert [{work.views for work in batch} for batch in worker.batches] == [{4}, {5}]


@virtual
async def test_the_budget_of_the_worker_holds_unless_the_operator_sets_one():
    # One of four views is kept, so they count as ten of 10 tokens. With two labels of 6 tokens, a
    # request has 112.
    for knobs, expected in (({}, [2, 1]), ({"max_batch_tokens": 1000}, [3])):
        worker = FakeWorker(ready=replace(READY, max_batch_tokens=2 * 112))
        async with open_engine(worker, **knobs) as harness:
            await asyncio.gather(*(harness.ask(str(i)) for i in range(3)))
            assert sizes(worker) == expected


@virtual
@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
async def test_of_several_workers_the_smallest_budget_holds(order: tuple[int, int]):
    small, large = (replace(READY, max_batch_tokens=requests * 112) for requests in (2, 3))
    workers = by_hand(ready=small), by_hand(ready=large)
    async with open_engine(*workers, max_queue_delay_ms=0) as harness:
        for index in order:
            workers[index].be_ready()
        asked = [harness.asking(str(i)) for i in range(2 + 6)]
        await asyncio.sleep(0.1)
        assert max(size for worker in workers for size in sizes(worker)) == 2
        workers[0].die()  # then the larger one counts alone
        for _ in range(8):
            if workers[1].busy:
                workers[1].finish()
            await asyncio.sleep(0.1)
        assert max(sizes(workers[1])) == 3
        await asyncio.gather(*asked)


@virtual
async def test_one_batch_runs_at_a_time_and_early_answers_do_not_wait():
    worker = by_hand()
    async with open_engine(worker, max_batch_size=2) as harness:
        worker.be_ready()
        first, second, third = (harness.asking(str(i)) for i in range(3))
        await asyncio.sleep(0.1)
        worker.settle(worker.batches[0][0])
        await first
        assert not second.done()
        assert sizes(worker) == [2]
        worker.finish()
        await asyncio.sleep(0.1)
        assert second.done()
        assert sizes(worker) == [2, 1]
        worker.finish()
        await third


@virtual
async def test_all_workers_work():
    workers = [FakeWorker(seconds=lambda batch: 1.0) for _ in range(2)]
    async with open_engine(*workers, max_batch_size=1) as harness:
        await asyncio.gather(*(harness.ask(str(i)) for i in range(4)))
        assert [sizes(worker) for worker in workers] == [[1, 1], [1, 1]]
        assert now() < 2.1


@virtual
@pytest.mark.parametrize("size", [1, 2], ids=["in a batch that is ready", "in the queue"])
async def test_a_deadline_before_the_work_began_is_a_504_at_that_instant(size: int):
    worker = by_hand()
    async with open_engine(worker, max_batch_size=size) as harness:
        worker.be_ready()
        running = harness.asking("running")
        await asyncio.sleep(0.1)
        began = now()
        with pytest.raises(DeadlineExceeded, match="in the queue"):
            await harness.ask("late", timeout=1.0)
        assert now() - began == pytest.approx(1.0)
        assert worker.cancelled == {work.id for batch in worker.batches[1:] for work in batch}
        assert harness.metric("truncated_total", reason="cancelled") is None
        worker.finish()
        await running


@virtual
async def test_a_full_batch_lies_ready_while_another_runs():
    worker = by_hand()
    async with open_engine(worker, max_batch_size=2) as harness:
        worker.be_ready()
        first = [harness.asking(f"{i}") for i in range(2)]
        await asyncio.sleep(0.1)
        second = [harness.asking("2")]
        await asyncio.sleep(0.1)
        assert sizes(worker) == [2]  # one that may still grow does not go ahead
        second.append(harness.asking("3"))
        third = [harness.asking("4"), harness.asking("5")]
        await asyncio.sleep(0.1)
        assert sizes(worker) == [2, 2]  # and no more than one does
        assert harness.engine.queue_depth == 4  # what has not begun waits
        assert harness.metric("queue_seconds_count") == 2
        worker.finish()
        await asyncio.gather(*first)
        assert sizes(worker) == [2, 2, 2]
        assert harness.engine.queue_depth == 2
        worker.finish()
        worker.finish()
        await asyncio.gather(*second, *third)


@virtual
async def test_a_client_that_leaves_a_batch_before_it_began_is_dropped_from_it():
    worker = by_hand()
    async with open_engine(worker, max_batch_size=1) as harness:
        worker.be_ready()
        running, leaving = harness.asking("running"), harness.asking("leaving")
        await asyncio.sleep(0.1)
        leaving.cancel()
        await asyncio.sleep(0.1)
        assert worker.cancelled == {worker.batches[1][0].id}
        assert harness.engine.queue_depth == 0
        worker.finish()
        await running
        worker.deliver(Finished())
        assert harness.engine._pool.free


@virtual
async def test_what_had_not_begun_when_the_worker_died_is_not_held_to_account():
    worker = by_hand()
    async with open_engine(worker, max_batch_size=2) as harness:
        worker.be_ready()
        asked = [harness.asking(f"{i}") for i in range(4)]
        await asyncio.sleep(0.1)
        assert sizes(worker) == [2, 2]
        worker.die()
        worker.be_ready()
        await asyncio.sleep(0.1)
        assert sizes(worker)[2:] == [1]  # each of those that ran goes alone
        worker.finish()
        worker.finish()
        assert sizes(worker)[2:] == [1, 1, 2]  # the others go together again
        worker.finish()
        await asyncio.gather(*asked)


@virtual
async def test_what_lies_ready_beside_a_slow_worker_goes_to_one_that_is_free():
    slow, fast = by_hand(), by_hand()
    harness = Harness(slow, fast, max_batch_size=1)
    await harness.engine.start()
    slow.be_ready()
    first = harness.asking("0")
    await asyncio.sleep(0.1)
    fast.be_ready()
    others = []
    for number in (1, 2):
        others.append(harness.asking(f"{number}"))
        await asyncio.sleep(0.1)
    assert (sizes(slow), sizes(fast)) == ([1, 1], [1])
    fast.finish()
    assert sizes(fast) == [1, 1]
    assert slow.cancelled == {fast.batches[1][0].id}
    fast.finish()
    await asyncio.gather(*others)
    slow.finish()
    await first
    slow.deliver(Finished())
    harness.assert_nothing_left()
    await harness.engine.stop(1.0)


@virtual
async def test_a_batch_that_nobody_waited_for_does_not_make_requests_look_quick():
    worker = FakeWorker(seconds=lambda batch: 10.0 if batch[0].labels[0] == "stays" else 0.0)
    async with open_engine(worker, max_batch_size=1) as harness:
        for _ in range(30):
            staying = harness.asking(label="stays")
            await asyncio.sleep(0.1)
            leaving = harness.asking(label="leaves")
            await asyncio.sleep(0.1)
            leaving.cancel()
            await staying
            await asyncio.sleep(0.1)
        assert harness.engine._pool.seconds_per_request == pytest.approx(10.0, rel=0.01)
        assert harness.metric("batch_size_count") == 30


@virtual
async def test_the_next_batch_lies_ready_where_it_is_likely_to_begin_first():
    slow, fast = by_hand(), by_hand()
    harness = Harness(slow, fast, max_batch_size=1)
    await harness.engine.start()
    slow.be_ready()
    asked = [harness.asking("0")]
    await asyncio.sleep(0.1)
    fast.be_ready()
    for number in (1, 2):
        asked.append(harness.asking(f"{number}"))
        await asyncio.sleep(0.1)
    assert (sizes(slow), sizes(fast)) == ([1, 1], [1])
    for worker in (slow, fast, slow):
        worker.finish()
    await asyncio.gather(*asked)
    await harness.engine.stop(1.0)


@virtual
async def test_a_silent_batch_is_given_up_some_time_after_the_deadline():
    worker = by_hand()
    async with open_engine(worker) as harness:
        worker.be_ready()
        with pytest.raises(DeadlineExceeded):
            await harness.ask(timeout=1.0)
        assert now() == pytest.approx(0.001 + 1.0 + GRACE)
        assert worker.cancelled == {worker.batches[0][0].id}
        assert harness.metric("truncated_total", reason="deadline") == 1
        assert harness.metric("truncated_total", reason="cancelled") is None


@virtual
async def test_a_client_that_leaves_the_queue_is_never_worked_on():
    worker = by_hand()
    async with open_engine(worker) as harness:
        worker.be_ready()
        leaving = harness.asking()
        await asyncio.sleep(0.001)
        leaving.cancel()
        await asyncio.sleep(1.0)
        assert leaving.cancelled()
        assert worker.batches == []
        harness.assert_nothing_left()


@virtual
async def test_a_client_that_leaves_a_batch_stops_its_work_only():
    worker = by_hand()
    async with open_engine(worker) as harness:
        worker.be_ready()
        leaving, staying = harness.asking("leaving"), harness.asking("staying")
        await asyncio.sleep(0.1)
        leaving.cancel()
        await asyncio.sleep(0.1)
        assert worker.cancelled == {worker.batches[0][0].id}
        assert harness.metric("truncated_total", reason="cancelled") == 1
        worker.finish()  # with an answer for the one that left, which nobody takes
        assert (await staying).views == 4
        assert harness.metric("adaptation_steps_count") == 1


@virtual
async def test_a_full_queue_is_a_429_that_knows_how_long():
    worker = FakeWorker(seconds=lambda batch: 6.0 * len(batch))
    async with open_engine(worker, max_queue_size=2, max_batch_size=2) as harness:
        for _ in range(20):  # the mean forgets its first guess
            await asyncio.gather(harness.ask(), harness.ask())
        running = [harness.asking(), harness.asking()]
        await asyncio.sleep(0.1)
        waiting = [harness.asking(), harness.asking()]
        await asyncio.sleep(0.1)
        with pytest.raises(QueueFull) as refusal:
            await harness.ask()
        assert 0.8 * 4 * 5.6 <= refusal.value.retry_after <= 1.2 * 4 * 6
        assert harness.metric("rejected_total", reason="queue_full") == 1
        await asyncio.gather(*running, *waiting)


@pytest.mark.parametrize(
    ("seconds", "clients", "spread"),
    [(0.5, 400, 20.0), (0.5, 400, 0.0), (2.0, 200, 5.0), (0.005, 900, 0.0), (0.005, 2000, 1.0)],
)
def test_who_waits_as_told_is_let_in_at_once(seconds: float, clients: int, spread: float):
    """Nearly all of those refused in a burst, when nobody else asks meanwhile."""

    @virtual
    async def scenario() -> None:
        worker = FakeWorker(seconds=lambda batch: seconds * len(batch))
        async with open_engine(worker, request_timeout_ms=600_000) as harness:
            await asyncio.gather(*(harness.ask(timeout=600) for _ in range(64)))
            for _ in range(20):  # the mean forgets its first guess
                await harness.ask()

            async def client(i: int) -> bool | None:
                await asyncio.sleep(spread * i / clients)
                try:
                    await harness.ask(timeout=600)
                except QueueFull as refusal:
                    await asyncio.sleep(math.ceil(refusal.retry_after or 0))
                else:
                    return None
                with contextlib.suppress(QueueFull):
                    await harness.ask(timeout=600)
                    return True
                return False

            outcomes = await asyncio.gather(*(client(i) for i in range(clients)))
            refused = [outcome for outcome in outcomes if outcome is not None]
            assert len(refused) > clients / 2
            assert sum(refused) >= 0.95 * len(refused)

    scenario()


@virtual
async def test_nobody_is_told_to_wait_for_ever_nor_after_the_crowd_is_gone():
    worker = FakeWorker(seconds=lambda batch: 10.0 * len(batch))
    async with open_engine(worker, max_queue_size=3, max_batch_size=1) as harness:
        first = [harness.asking(), harness.asking(), harness.asking()]
        await asyncio.sleep(0.1)
        waits = []
        for _ in range(800):
            with pytest.raises(QueueFull) as refusal:
                harness.engine.reserve(1)
            waits.append(refusal.value.retry_after)
        assert waits == sorted(waits)
        assert waits[-1] == MAX_SECONDS
        await asyncio.gather(*first)
        again = [harness.asking(timeout=60), harness.asking(timeout=60), harness.asking(timeout=60)]
        await asyncio.sleep(0.1)
        with pytest.raises(QueueFull) as refusal:
            harness.engine.reserve(1)
        assert refusal.value.retry_after < 60
        await asyncio.gather(*again)


@virtual
async def test_the_queue_is_bounded_in_bytes_and_a_slot_frees_them():
    async with open_engine(FakeWorker(), max_queue_size=8, max_body_bytes=1024) as harness:
        engine = harness.engine
        with reserved(engine, 7 * BYTES_PER_PERMIT) as large:
            with pytest.raises(QueueFull):
                engine.reserve(BYTES_PER_PERMIT + 1)
            large.release()
            with reserved(engine, 8 * BYTES_PER_PERMIT):
                assert harness.engine.queue_depth == 1


@virtual
async def test_the_place_in_the_queue_is_free_once_the_batch_has_begun():
    worker = by_hand()
    async with open_engine(worker, max_queue_size=1) as harness:
        worker.be_ready()
        running = harness.asking("running")
        await asyncio.sleep(0.1)
        assert harness.engine.queue_depth == 0
        worker.finish()
        await running


@virtual
@pytest.mark.parametrize(
    ("places", "waiting"),
    [(8, 6), (3, 2), (2, 2), (1, 1)],
    ids=["those that run count", "a batch may gather", "the same", "but no more than the queue"],
)
async def test_what_runs_takes_places_too(places: int, waiting: int):
    worker = by_hand()
    async with open_engine(worker, max_queue_size=places, max_batch_size=2) as harness:
        worker.be_ready()
        running = [harness.asking(f"running {i}") for i in range(min(2, places))]
        await asyncio.sleep(0.1)
        with contextlib.ExitStack() as permits:
            for _ in range(waiting):
                permits.enter_context(reserved(harness.engine, 1))
            with pytest.raises(QueueFull):
                harness.engine.reserve(1)
        worker.finish()
        await asyncio.gather(*running)


@virtual
async def test_before_the_first_ready_and_after_the_drain_it_is_503():
    worker = by_hand()
    async with open_engine(worker) as harness:
        assert not harness.engine.ready
        assert harness.engine.model is None
        assert harness.engine.info == {"workers": {"configured": 1, "ready": 0}}
        with pytest.raises(NotReady, match="not ready") as refusal:
            await harness.ask()
        assert refusal.value.retry_after >= 1
        worker.be_ready()
        assert harness.engine.ready
        assert harness.engine.model is not None
        assert harness.engine.info == {
            "model": {"name": "fake"},
            "workers": {"configured": 1, "ready": 1},
        }
        harness.engine.drain()
        assert not harness.engine.ready
        with pytest.raises(NotReady, match="shutting down"):
            await harness.ask()
        assert harness.metric("rejected_total", reason="not_ready") == 1
        assert harness.metric("rejected_total", reason="draining") == 1


@virtual
async def test_a_lost_batch_runs_again_one_by_one_before_the_others():
    worker = by_hand()
    async with open_engine(worker, max_batch_size=3) as harness:
        worker.be_ready()
        tasks = [harness.asking(str(i), label=str(i)) for i in range(4)]
        await asyncio.sleep(0.1)
        worker.die()
        assert not harness.engine.ready
        assert harness.engine.alive
        assert harness.metric("worker_up", worker="0") == 0
        assert harness.metric("worker_restarts_total") == 1
        worker.be_ready()
        for _ in tasks:
            await asyncio.sleep(0.1)
            worker.finish()
        await asyncio.gather(*tasks)
        order = [[work.labels[0] for work in batch] for batch in worker.batches]
        assert order == [["0", "1", "2"], ["0"], ["1"], ["2"], ["3"]]
        assert harness.metric("queue_seconds_count") == 4


@virtual
async def test_who_loses_two_workers_is_503_and_takes_nobody_along():
    def seconds(batch: list[Task]) -> float:
        killers = any(work.labels[0] == "killer" for work in batch)
        if killers:
            asyncio.get_running_loop().call_later(0.5, worker.die)
            asyncio.get_running_loop().call_later(1.0, worker.be_ready)
        return 10.0 if killers else 0.1

    worker = FakeWorker(seconds=seconds)
    async with open_engine(worker) as harness:
        labels = ["cat", "killer", "dog"]
        asked = (harness.ask(label, label=label) for label in labels)
        cat, killer, dog = await asyncio.gather(*asked, return_exceptions=True)
        assert isinstance(killer, NotReady)
        assert killer.retry_after >= 1
        assert isinstance(cat, Answer)
        assert isinstance(dog, Answer)
        assert sizes(worker) == [3, 1, 1, 1]


@virtual
async def test_another_worker_takes_over_but_never_a_third():
    first, second = by_hand(), by_hand()
    async with open_engine(first, second) as harness:
        first.be_ready()
        second.be_ready()
        asked = harness.asking()
        await asyncio.sleep(0.1)
        first.die()
        assert harness.engine.ready
        assert sizes(second) == [1]
        first.be_ready()
        second.die()
        with pytest.raises(NotReady, match="lost"):
            await asked
        assert sizes(first) == [1]


@virtual
async def test_an_answer_in_time_outlives_its_worker():
    worker = by_hand()
    async with open_engine(worker) as harness:
        worker.be_ready()
        asked = harness.asking()
        await asyncio.sleep(0.1)
        worker.settle()
        worker.die(exhausted=True)
        assert isinstance(await asked, Answer)


@virtual
async def test_workers_that_never_come_back_end_the_waiting():
    worker = by_hand()
    async with open_engine(worker) as harness:
        worker.be_ready()
        running = harness.asking()
        await asyncio.sleep(0.1)
        worker.die(exhausted=True)
        with pytest.raises(NotReady, match="started"):
            await running
        assert not harness.engine.alive
        assert harness.engine.fatal == "No worker can be started: killed by the test"
        assert harness.metric("worker_restarts_total") == 0


@virtual
async def test_a_worker_that_cannot_be_started_is_tried_again_while_another_is_ready():
    steady, lost = by_hand(), by_hand()
    async with open_engine(steady, lost) as harness:
        engine = harness.engine
        steady.be_ready()
        lost.be_ready()
        lost.die(exhausted=True)
        assert engine.ready
        assert engine.alive
        lost.be_ready()
        steady.die(exhausted=True)  # the other one has recovered
        assert engine.ready
        assert engine.alive
        lost.die()
        assert engine.alive  # and may recover again
        lost.die(exhausted=True)
        assert not engine.alive


@virtual
async def test_a_model_that_cannot_be_loaded_again_costs_no_other_worker_anything():
    worker, other = by_hand(), by_hand()
    async with open_engine(worker, other) as harness:
        worker.be_ready()
        asked = harness.asking()
        await asyncio.sleep(0.1)
        other.give_up("The hub does not answer.")
        other.die()
        assert harness.engine.fatal is None
        worker.finish()
        assert isinstance(await asked, Answer)
        worker.die()
        worker.give_up("The disk is full.")
        worker.die()
        assert harness.engine.alive
        worker.be_ready()
        asked = harness.asking()
        await asyncio.sleep(0.1)
        worker.finish()
        assert isinstance(await asked, Answer)


@virtual
async def test_a_model_that_cannot_be_served_is_told_in_its_sentence():
    worker = by_hand()
    async with open_engine(worker) as harness:
        worker.give_up("No checkpoint in there.")
        assert harness.engine.fatal == "No checkpoint in there."
        assert not harness.engine.alive
        assert not harness.engine.ready


@virtual
async def test_a_poisoned_request_fails_alone():
    def reply(work: Task) -> Answer | Failure:
        return Failure("unprocessable", "Poison.") if work.labels[0] == "bad" else answer(work)

    async with open_engine(FakeWorker(reply=reply)) as harness:
        asked = (harness.ask(str(i), label="bad" if i == 1 else "good") for i in range(3))
        outcomes = await asyncio.gather(*asked, return_exceptions=True)
        assert [getattr(outcome, "status", 200) for outcome in outcomes] == [200, 422, 200]
        assert outcomes[1].message == "Poison."


@virtual
async def test_a_failure_of_no_known_type_is_internal():
    async with open_engine(FakeWorker(reply=lambda work: Failure("?", "Odd."))) as harness:
        with pytest.raises(InternalError, match="Odd"):
            await harness.ask()


@virtual
async def test_answers_that_are_late_double_or_missing():
    worker = by_hand()
    async with open_engine(worker) as harness:
        worker.be_ready()
        answered, forgotten = harness.asking("answered"), harness.asking("forgotten")
        await asyncio.sleep(0.1)
        for _ in range(2):
            worker.settle(worker.batches[0][0])
        worker.deliver(Settled("unknown", Failure("internal", "For nobody.")))
        counts = {"text_cache_hits": 3, "oom_splits": 2, "error_splits": 1}
        worker.deliver(Finished(counts))
        assert isinstance(await answered, Answer)
        assert harness.metric("adaptation_steps_count") == 1
        with pytest.raises(InternalError):
            await forgotten
        assert harness.metric("text_cache_hits_total") == 3
        assert harness.metric("batch_splits_total", reason="oom") == 2
        assert harness.metric("batch_splits_total", reason="error") == 1


@virtual
async def test_two_requests_may_carry_the_same_id():
    worker = FakeWorker()
    async with open_engine(worker) as harness:
        await asyncio.gather(harness.ask("same"), harness.ask("same"))
        assert sizes(worker) == [2]


@virtual
async def test_stop_waits_for_what_was_accepted_even_before_its_decoding():
    worker = FakeWorker(seconds=lambda batch: 2.0)
    harness = Harness(worker)
    await harness.engine.start()
    await asyncio.sleep(0.001)

    async def upload() -> Answer:
        with reserved(harness.engine, 10) as permit:
            await asyncio.sleep(1.0)
            image = np.zeros((1, 1, 3), np.uint8)
            work = Task("x", image, ("a", "b"), "{}", "tapt", 1, 4, "all", 0, now() + 60)
            return await harness.engine.submit(permit, work)

    uploading = asyncio.create_task(upload())
    await asyncio.sleep(0.1)
    await harness.engine.stop(30.0)
    assert isinstance(await uploading, Answer)
    assert now() < 4
    assert worker.stopped
    harness.assert_nothing_left()


@virtual
async def test_stop_fails_what_the_drain_did_not_finish():
    worker = by_hand()
    harness = Harness(worker, max_batch_size=1)
    await harness.engine.start()
    worker.be_ready()
    asked = [harness.asking(str(i)) for i in range(2)]
    await asyncio.sleep(0.1)
    await harness.engine.stop(3.0)
    assert now() == pytest.approx(3.1)
    outcomes = await asyncio.gather(*asked, return_exceptions=True)
    assert all(isinstance(outcome, NotReady) for outcome in outcomes)
    harness.assert_nothing_left()


@virtual
async def test_the_default_drain_lasts_until_every_accepted_request_has_ended():
    settings = Settings()
    worker = by_hand()
    harness = Harness(worker, max_batch_size=1)
    await harness.engine.start()
    worker.be_ready()
    slow, hanging = (harness.asking(x, timeout=settings.request_timeout_ms / 1000) for x in "ab")
    await asyncio.sleep(0.1)
    asyncio.get_running_loop().call_later(59.0, worker.finish)
    await harness.engine.stop(settings.drain_timeout_s)
    assert isinstance(await slow, Answer)
    with pytest.raises(DeadlineExceeded):  # its own end, not that of the server
        await hanging
    harness.assert_nothing_left()


moments = st.floats(0, 10).map(lambda t: round(t, 2))


@given(
    requests=st.lists(
        st.tuples(
            moments, st.integers(1, 3), st.floats(0.01, 8), st.none() | moments, st.booleans()
        ),
        max_size=25,
    ),
    deaths=st.lists(st.tuples(st.integers(0, 1), moments, moments), max_size=5),
    durations=st.lists(st.sampled_from([0.0, 0.3, 2.0, 1e9]), min_size=1),
    failing=st.integers(0, 3),
    stop=st.tuples(moments, moments),
)
@example(  # what lies beside a worker that dies may be given to a third one
    requests=[
        *[(0, 1, 8, 1, False)] * 4,
        *[(0.1, 1, 8, 0.5, False)] * 4,
        *[(0.2, 1, 8, None, False)] * 4,
    ],
    deaths=[(0, 2, 0.1), (1, 2.5, 0.1), (0, 3, 0.1), (1, 3.5, 0.1), (0, 4, 0.1)],
    durations=[1e9],
    failing=0,
    stop=(9, 0),
)
@budget(max_examples=150, deadline=None)
@virtual
async def test_whatever_happens_each_settles_once_and_nothing_is_left(
    requests, deaths, durations, failing, stop
):
    """Requests (arrival, views, timeout, when the client leaves, whether heavy), workers that die
    and return, batches that are slow or endless, failures, and a stop somewhere in the middle."""

    def reply(work: Task) -> Answer | Failure:
        return Failure("internal", "Odd.") if work.views == failing else answer(work)

    def seconds(batch: list[Task]) -> float:
        return durations[len(batch[0].id) % len(durations)]

    workers = [FakeWorker(reply=reply, seconds=seconds) for _ in range(2)]
    harness = Harness(*workers, max_queue_size=6, max_batch_size=4)
    await harness.engine.start()
    await asyncio.sleep(0)

    async def client(
        id: str, at: float, views: int, timeout: float, leave: float | None, heavy: bool
    ) -> str:
        await asyncio.sleep(at)
        try:
            async with asyncio.timeout(leave):
                caller = "ab"[len(id) % 2]
                await harness.ask(id, views=views, timeout=timeout, caller=caller, heavy=heavy)
        except (ServiceError, TimeoutError) as error:
            return type(error).__name__
        return "answer"

    async def death(which: int, at: float, pause: float) -> None:
        await asyncio.sleep(at)
        if harness.engine._pool._workers[which].ready:
            workers[which].die()
            await asyncio.sleep(pause)
            workers[which].be_ready()

    clients = [client("x" * i, *request) for i, request in enumerate(requests)]
    tasks = [asyncio.create_task(each) for each in (*clients, *(death(*each) for each in deaths))]
    await asyncio.sleep(stop[0])
    await harness.engine.stop(stop[1])
    await asyncio.gather(*tasks)
    harness.assert_nothing_left()
    runs = [work.id for worker in workers for batch in worker.begun for work in batch]
    assert all(runs.count(id) <= 2 for id in set(runs))
