"""Batches: who runs together, in which order, and when."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.engine.scheduler import Item, Scheduler
from service.messages import Task


def make_task(
    id: str = "a",
    labels: tuple[str, ...] = ("cat", "dog"),
    views: int = 4,
    deadline: float = 100.0,
) -> Task:
    image = np.zeros((1, 1, 3), np.uint8)
    return Task(id, image, labels, "a {}", "tapt", 1, views, "all", 0, deadline)


def item(
    id: str,
    enqueued: float = 0.0,
    key: str = "k",
    tokens: int = 1,
    deadline: float = 100.0,
    caller: str = "",
    price: float = 1.0,
) -> Item:
    task = make_task(id, deadline=deadline)
    return Item(task, key, tokens, enqueued, caller=caller, price=price)


def filled(*items: Item, size: int = 3, tokens: int = 100, delay: float = 1.0) -> Scheduler:
    scheduler = Scheduler(size, tokens, delay)
    for each in items:
        scheduler.add(each)
    return scheduler


def ids(batch: list[Item] | None) -> str | None:
    return batch and "".join(each.task.id for each in batch)


def test_a_full_batch_is_due_at_once_and_the_rest_waits():
    scheduler = filled(*(item(id) for id in "abcd"))
    assert ids(scheduler.next_batch(0.0)) == "abc"
    assert scheduler.next_batch(0.999) is None
    assert scheduler.wake_at() == 1.0
    assert ids(scheduler.next_batch(1.0)) == "d"
    assert scheduler.wake_at() is None


@pytest.mark.parametrize("delay", [0.0, 1.0])
def test_ahead_of_time_only_a_full_batch_goes_and_only_the_oldest(delay: float):
    scheduler = filled(*(item(id) for id in "ab"), delay=delay)
    assert scheduler.full_batch() is None
    scheduler.add(item("c"))
    assert ids(scheduler.full_batch()) == "abc"
    scheduler.add(item("rare", 0.1, "other"))
    for id in "def":
        scheduler.add(item(id, 0.2))
    assert scheduler.full_batch() is None
    assert ids(scheduler.next_batch(2.0)) == "rare"
    assert ids(scheduler.full_batch()) == "def"


def test_tokens_fill_a_batch_before_its_size_does():
    scheduler = filled(item("a", tokens=60), item("b", tokens=40), item("c", tokens=1))
    assert ids(scheduler.next_batch(0.0)) == "ab"
    assert scheduler.next_batch(0.0) is None


def test_what_does_not_fit_is_not_overtaken():
    scheduler = filled(item("a", tokens=60), item("b", tokens=60), item("c", tokens=1))
    assert ids(scheduler.next_batch(0.0)) == "a"
    assert ids(scheduler.next_batch(1.0)) == "bc"


def test_an_item_above_the_whole_budget_runs_alone():
    scheduler = filled(item("a"), item("b", tokens=1000), item("c"))
    assert [ids(scheduler.next_batch(0.0)) for _ in range(3)] == ["a", "b", None]
    assert ids(scheduler.next_batch(1.0)) == "c"


def test_keys_do_not_mix_and_the_oldest_goes_first():
    scheduler = filled(item("a", 0.0, "x"), item("b", 0.1, "y"), item("c", 0.2, "x"))
    assert scheduler.wake_at() == 1.0
    assert [ids(scheduler.next_batch(2.0)) for _ in range(3)] == ["ac", "b", None]


def test_a_full_batch_does_not_wait_behind_one_that_is_not_due():
    scheduler = filled(item("a", 0.0, "x"), *(item(id, 0.5, "y") for id in "bcd"))
    assert scheduler.wake_at() <= 0.5
    assert ids(scheduler.next_batch(0.5)) == "bcd"
    assert ids(scheduler.next_batch(1.0)) == "a"


def test_expiry_takes_out_exactly_the_late_ones():
    scheduler = filled(item("a", deadline=0.5), item("b", deadline=0.7))
    assert scheduler.wake_at() == 0.5
    assert scheduler.expire(0.4) == []
    assert ids(scheduler.expire(0.5)) == "a"
    assert ids(scheduler.next_batch(1.0)) == "b"


def test_without_a_free_worker_only_deadlines_matter():
    scheduler = filled(item("a", deadline=50.0))
    assert scheduler.wake_at(worker_free=False) == 50.0


def test_put_back_goes_before_everything_else():
    scheduler = filled(item("a", 0.0), item("b", 0.1))
    taken = scheduler.next_batch(1.0)
    scheduler.add(item("c", 1.1))
    scheduler.put_back(taken)
    assert ids(scheduler.next_batch(1.1)) == "abc"


def test_what_is_removed_is_in_no_batch():
    scheduler = filled(item("a"), item("b"))
    scheduler.remove("a")
    scheduler.remove("a")
    assert ids(scheduler.next_batch(1.0)) == "b"
    assert scheduler.wake_at() is None


def one_by_one(scheduler: Scheduler) -> str:
    order = ""
    while batch := scheduler.next_batch(1e9):
        order += ids(batch)
    return order


def test_callers_take_turns_by_the_work_they_were_served():
    heavy = [item(id, caller="heavy", price=3.0) for id in "HIJ"]
    light = [item(id, caller="light") for id in "abcdef"]
    assert one_by_one(filled(*heavy, *light, size=1)) == "aHbcdIefJ"


def test_a_newcomer_is_next_however_much_another_caller_queued():
    scheduler = filled(*(item(id, caller="busy") for id in "abcdef"), size=1)
    assert [ids(scheduler.next_batch(1.0)) for _ in range(3)] == ["a", "b", "c"]
    scheduler.add(item("x", caller="new"))
    scheduler.add(item("y", caller="new"))
    # It is behind by what the turn before was, not by all that it missed while it was idle.
    assert one_by_one(scheduler) == "xdyef"


def test_of_one_caller_a_cheap_item_overtakes_an_expensive_one_but_not_for_ever():
    scheduler = filled(item("H", price=5.0), size=1)
    order = ""
    for id in "abcdefgh":
        scheduler.add(item(id))
        order += ids(scheduler.next_batch(1.0))
    assert order + one_by_one(scheduler) == "abcdHefgh"


def test_an_expensive_batch_does_not_go_ahead_of_time():
    scheduler = filled(*(item(id, price=9.0) for id in "abc"))
    assert scheduler.full_batch() is None
    assert ids(scheduler.next_batch(0.0)) == "a"


def test_the_price_fills_a_batch_too():
    scheduler = filled(*(item(id, price=2.5) for id in "abcd"))  # a batch costs at most 3 * 2
    assert [ids(scheduler.next_batch(0.0)) for _ in range(2)] == ["ab", None]
    assert ids(scheduler.next_batch(1.0)) == "cd"


def test_what_was_put_back_is_charged_once():
    mine, others = (item(id, caller="x") for id in "ab"), (item(id, caller="y") for id in "cde")
    scheduler = filled(*mine, *others, size=1)
    for _ in range(5):
        scheduler.put_back(scheduler.next_batch(1.0))
    assert one_by_one(scheduler) == "acbde"


arrivals = st.lists(
    st.tuples(st.sampled_from("abc"), st.sampled_from([0.1, 1.0, 10.0]), st.integers(0, 2)),
    min_size=1,
    max_size=40,
)


@given(arrivals=arrivals, price=st.sampled_from([0.1, 1.0, 10.0]), first=st.integers(0, 20))
def test_nobody_starves(arrivals, price, first):
    """An item that is alone of its caller waits for no more work of each other caller than its own
    price, and one item more, however many arrive before and after."""
    scheduler = filled(size=1)
    served = dict.fromkeys("abc", 0.0)
    serial = itertools.count()
    endless = itertools.chain(arrivals[first:], itertools.cycle(arrivals))
    for caller, cost, _ in arrivals[:first]:
        scheduler.add(item(str(next(serial)), caller=caller, price=cost))
    scheduler.next_batch(1.0)
    scheduler.add(item("mine", caller="me", price=price))
    for _ in range(2000):
        caller, cost, runs = next(endless)
        scheduler.add(item(str(next(serial)), caller=caller, price=cost))
        for _ in range(runs + 1):
            (batch,) = scheduler.next_batch(1.0) or [None]
            if batch is None:
                break
            if batch.task.id == "mine":
                assert all(work <= 10.0 + 1e-6 for work in served.values())
                return
            served[batch.caller] += batch.price
    raise AssertionError("starved")


@given(others=st.lists(st.sampled_from([0.1, 1.0, 4.0]), min_size=1, max_size=20))
def test_an_expensive_item_waits_for_no_more_later_work_than_its_price(others):
    scheduler = filled(item("mine", price=20.0), size=1)
    work = 0.0
    for number, cost in enumerate(itertools.cycle(others)):
        scheduler.add(item(str(number), price=cost))
        (taken,) = scheduler.next_batch(1.0)
        if taken.task.id == "mine":
            break
        work += taken.price
    assert work <= 20.0 + 1e-6
