"""Batches: who runs together, in which order, and when."""

import numpy as np
import pytest

from service.engine.price import count_tokens
from service.engine.scheduler import Item, Scheduler
from service.messages import Ready, Task


def make_task(
    id: str = "a",
    labels: tuple[str, ...] = ("cat", "dog"),
    views: int = 4,
    deadline: float = 100.0,
) -> Task:
    image = np.zeros((1, 1, 3), np.uint8)
    return Task(id, image, labels, "a {}", "tapt", 1, views, "all", 0, deadline)


def item(
    id: str, enqueued: float = 0.0, key: str = "k", tokens: int = 1, deadline: float = 100.0
) -> Item:
    return Item(make_task(id, deadline=deadline), key, tokens, enqueued)


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


@pytest.mark.parametrize(
    ("labels", "expected"),
    [(("cat", "dog"), 4 * 50 + 2 * 5), (("cat", "x" * 1000), 4 * 50 + 2 * 77)],
)
def test_tokens_count_every_view_and_the_longest_label_up_to_the_context(labels, expected):
    model = Ready(info={}, max_batch_tokens=1, image_tokens=50, context_length=77)
    assert count_tokens(make_task(labels=labels), model, "") == expected
