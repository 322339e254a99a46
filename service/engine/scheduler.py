"""Which requests share a batch, in which order, and when it is due.

Pure: instants are arguments. A batch holds items of one key. It is bounded in requests, in tokens
(image tokens of every view, text tokens of every label), because memory grows with tokens and not
with requests, and in the sum of its prices, because what arrives next waits until it has run.

The order is start-time fair queueing (Goyal et al., 1996) over callers: the caller that was served
least goes next, counted in prices. Of one caller's items, the one with the least sum of its price
and the work served to the caller before it arrived goes first. So a cheap item overtakes an
expensive one, which later items can delay by no more work than its own price. Equal items keep
their order of arrival.
"""

import math
from collections.abc import Hashable, Iterable
from dataclasses import dataclass

from service.engine.price import price_class
from service.messages import Task


@dataclass(frozen=True, slots=True)
class Item:
    """A queued task. Items of equal `key` may share a batch, of which this one takes `tokens`.

    `enqueued` is an instant in seconds; `attempts` counts the workers already lost with it. `price`
    is what `caller` is charged when the item leaves the queue.
    """

    task: Task
    key: Hashable
    tokens: int
    enqueued: float
    attempts: int = 0
    caller: str = ""
    price: float = 1.0


PRICE_PER_PLACE = 2.0
"""Price of a batch for each of its `max_batch_size` requests, at most. So a batch takes at most
about twice as long as a full one of typical requests, unless a single request takes longer."""


class Scheduler:
    """A queue that forms batches. A batch is due when it is full, in requests, tokens or price, or
    when its oldest item has waited `max_queue_delay` seconds."""

    def __init__(self, max_batch_size: int, max_batch_tokens: int, max_queue_delay: float) -> None:
        self.max_batch_size = max_batch_size
        self.max_batch_price = PRICE_PER_PLACE * max_batch_size
        self.max_batch_tokens = max_batch_tokens
        self.max_queue_delay = max_queue_delay
        self._items: dict[str, Item] = {}
        self._ranks: dict[str, float] = {}  # of items, within their caller
        self._served: dict[str, float] = {}  # work served to each caller
        self._virtual = 0.0  # work served to the caller whose turn it was last

    def add(self, item: Item) -> None:
        caller = item.caller
        served = self._served.get(caller, 0.0)
        if all(other.caller != caller for other in self._items.values()):
            # A caller gains nothing by having been idle.
            served = self._served[caller] = max(served, self._virtual)
        self._items[item.task.id] = item
        self._ranks[item.task.id] = served + item.price

    def put_back(self, items: Iterable[Item]) -> None:
        """Queue items again, before all others, that were taken and not run."""
        again = {item.task.id: item for item in items}
        for item in again.values():
            self._served[item.caller] -= item.price
        self._ranks |= dict.fromkeys(again, -math.inf)
        self._items = again | self._items

    def remove(self, id: str) -> None:
        """Remove an item if it is in the queue."""
        self._items.pop(id, None)
        self._ranks.pop(id, None)

    def expire(self, now: float) -> list[Item]:
        """Take out the items whose deadline has passed."""
        late = [item for item in self._items.values() if item.task.deadline <= now]
        for item in late:
            self.remove(item.task.id)
        return late

    def next_batch(self, now: float) -> list[Item] | None:
        """Take out the due batch whose turn comes first; None if none is due."""
        for batch, full in self._batches():
            if self._due(batch, full) <= now:
                return self._take(batch)
        return None

    def full_batch(self) -> list[Item] | None:
        """Take out the batch whose turn comes first if it is full and cheap, else None.

        If a fuller batch could overtake it, frequent keys would starve rare ones. An expensive one
        stays in the queue, where those that arrive later can overtake it.
        """
        for batch, full in self._batches():
            cheap = all(price_class(item.price) == 0 for item in batch)
            return self._take(batch) if full and cheap else None
        return None

    def wake_at(self, worker_free: bool = True) -> float | None:
        """The instant, perhaps past, at which `next_batch` or `expire` returns something.

        Without a free worker only deadlines count. None if nothing happens before the next `add`.
        """
        instants = [item.task.deadline for item in self._items.values()]
        if worker_free:
            instants += [self._due(batch, full) for batch, full in self._batches()]
        return min(instants, default=None)

    def _take(self, batch: list[Item]) -> list[Item]:
        self._virtual = max(self._virtual, min(self._served[item.caller] for item in batch))
        for item in batch:
            self.remove(item.task.id)
            self._served[item.caller] += item.price
        return batch

    def _due(self, batch: list[Item], full: bool) -> float:
        oldest = min(item.enqueued for item in batch)
        return oldest + (0.0 if full else self.max_queue_delay)

    def _batches(self) -> list[tuple[list[Item], bool]]:
        """The first batch of each key and whether it is full, ordered by their first items."""
        groups: dict[Hashable, list[Item]] = {}
        for item in self._order():
            groups.setdefault(item.key, []).append(item)
        return [self._cut(group) for group in groups.values()]

    def _order(self) -> list[Item]:
        """The items in the order of their turns."""
        ids = sorted(self._items, key=self._ranks.__getitem__)
        served, starts = dict(self._served), dict.fromkeys(ids, -math.inf)
        for id in ids:
            item = self._items[id]
            if self._ranks[id] != -math.inf:  # what was put back goes first
                starts[id] = served[item.caller]
            served[item.caller] += item.price
        return [self._items[id] for id in sorted(ids, key=starts.__getitem__)]

    def _cut(self, group: list[Item]) -> tuple[list[Item], bool]:
        """The longest start of a group within all bounds, never empty, and whether it is full."""
        batch, tokens, price = group[:1], group[0].tokens, group[0].price
        for item in group[1 : self.max_batch_size]:
            tokens, price = tokens + item.tokens, price + item.price
            if tokens > self.max_batch_tokens or price > self.max_batch_price:
                break
            batch.append(item)
        full = (
            len(batch) < len(group)
            or len(batch) == self.max_batch_size
            or tokens >= self.max_batch_tokens
            or price >= self.max_batch_price
        )
        return batch, full
