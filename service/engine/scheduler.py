"""Which requests run together, and when.

Pure: it holds items and answers questions about an instant that the caller names. A batch holds
items of one key, oldest first, and is bounded in requests and in tokens, since memory goes with
tokens (image tokens of every view, text tokens of every label) and not with requests.
"""

from collections.abc import Hashable, Iterable
from dataclasses import dataclass

from service.messages import Ready, Task


@dataclass(frozen=True, slots=True)
class Item:
    """A queued request. Items of equal `key` may share a batch; `tokens` is their price in it.

    `enqueued` and `deadline` are instants in seconds; `attempts` counts the workers already lost.
    """

    work: Task
    key: Hashable
    tokens: int
    enqueued: float
    deadline: float
    attempts: int = 0


class Scheduler:
    """A queue that groups. A batch is due when it is full by requests or by tokens, or when its
    oldest item has waited `max_queue_delay` seconds."""

    def __init__(self, max_batch_size: int, max_batch_tokens: int, max_queue_delay: float) -> None:
        self.max_batch_size = max_batch_size
        self.max_batch_tokens = max_batch_tokens
        self.max_queue_delay = max_queue_delay
        self._items: dict[str, Item] = {}

    def __len__(self) -> int:
        return len(self._items)

    def add(self, item: Item) -> None:
        self._items[item.work.id] = item

    def put_back(self, items: Iterable[Item]) -> None:
        """Queue again, before everything else, items that were taken and came to nothing."""
        self._items = {item.work.id: item for item in items} | self._items

    def remove(self, id: str) -> bool:
        """Forget an item; False when it is not in the queue."""
        return self._items.pop(id, None) is not None

    def expire(self, now: float) -> list[Item]:
        """Take out the items whose deadline has come."""
        late = [item for item in self._items.values() if item.deadline <= now]
        for item in late:
            del self._items[item.work.id]
        return late

    def next_batch(self, now: float) -> list[Item] | None:
        """Take out the due batch with the oldest item, or None when none is due."""
        for batch, full in self._batches():
            if self._due(batch, full) <= now:
                return self._take(batch)
        return None

    def full_batch(self) -> list[Item] | None:
        """Take out the batch with the oldest item of all if it is full, else None: were a fuller
        one to overtake it, a rare kind of request would starve beside a frequent one."""
        for batch, full in self._batches():
            return self._take(batch) if full else None
        return None

    def wake_at(self, worker_free: bool = True) -> float | None:
        """The instant, perhaps past, at which `next_batch` or `expire` has something.

        Without a free worker only deadlines count. None: nothing until an item is added.
        """
        instants = [item.deadline for item in self._items.values()]
        if worker_free:
            instants += [self._due(batch, full) for batch, full in self._batches()]
        return min(instants, default=None)

    def _take(self, batch: list[Item]) -> list[Item]:
        for item in batch:
            del self._items[item.work.id]
        return batch

    def _due(self, batch: list[Item], full: bool) -> float:
        return batch[0].enqueued + (0.0 if full else self.max_queue_delay)

    def _batches(self) -> list[tuple[list[Item], bool]]:
        """The first batch of each key, in order of their oldest items, and whether it is full."""
        groups: dict[Hashable, list[Item]] = {}
        for item in self._items.values():
            groups.setdefault(item.key, []).append(item)
        return [self._cut(group) for group in groups.values()]

    def _cut(self, group: list[Item]) -> tuple[list[Item], bool]:
        """The longest head of a group within both bounds (never empty), and whether it is full."""
        batch, tokens = group[:1], group[0].tokens
        for item in group[1 : self.max_batch_size]:
            if tokens + item.tokens > self.max_batch_tokens:
                break
            batch.append(item)
            tokens += item.tokens
        full = (
            len(batch) < len(group)
            or len(batch) == self.max_batch_size
            or tokens >= self.max_batch_tokens
        )
        return batch, full


def count_tokens(work: Task, model: Ready, default_template: str) -> int:
    """What a request costs in a batch: image tokens of all views, text tokens of all labels.

    There is no tokenizer on this side of the pipe. A prompt is taken as a token for each three
    UTF-8 bytes, and four for its ends and slots; all are as long as the longest, as in the batch.
    """
    template = work.template or default_template
    longest = max(len(template.replace("{}", label).encode()) for label in work.labels)
    text = min(model.context_length, 4 + longest // 3)
    return work.views * model.image_tokens + len(work.labels) * text
