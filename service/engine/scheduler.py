"""Which requests share a batch, and when it is due.

Pure: the caller names the instant. A batch holds items of one key, oldest first. It is bounded in
requests and in tokens (image tokens of every view, text tokens of every label), because memory
grows with tokens and not with requests.
"""

from collections.abc import Hashable, Iterable
from dataclasses import dataclass

from service.messages import Ready, Task


@dataclass(frozen=True, slots=True)
class Item:
    """A queued task. Items of equal `key` may share a batch, of which this one takes `tokens`.

    `enqueued` is an instant in seconds; `attempts` counts the workers already lost with it.
    """

    task: Task
    key: Hashable
    tokens: int
    enqueued: float
    attempts: int = 0


class Scheduler:
    """A queue that forms batches. A batch is due when it is full, in requests or tokens, or
    when its oldest item has waited `max_queue_delay` seconds."""

    def __init__(self, max_batch_size: int, max_batch_tokens: int, max_queue_delay: float) -> None:
        self.max_batch_size = max_batch_size
        self.max_batch_tokens = max_batch_tokens
        self.max_queue_delay = max_queue_delay
        self._items: dict[str, Item] = {}

    def add(self, item: Item) -> None:
        self._items[item.task.id] = item

    def put_back(self, items: Iterable[Item]) -> None:
        """Queue items again, before all others, that were taken and not run."""
        self._items = {item.task.id: item for item in items} | self._items

    def remove(self, id: str) -> None:
        """Remove an item if it is in the queue."""
        self._items.pop(id, None)

    def expire(self, now: float) -> list[Item]:
        """Take out the items whose deadline has passed."""
        late = [item for item in self._items.values() if item.task.deadline <= now]
        for item in late:
            del self._items[item.task.id]
        return late

    def next_batch(self, now: float) -> list[Item] | None:
        """Take out the due batch with the oldest item; None if none is due."""
        for batch, full in self._batches():
            if self._due(batch, full) <= now:
                return self._take(batch)
        return None

    def full_batch(self) -> list[Item] | None:
        """Take out the batch with the oldest item of all if it is full, else None.

        If a fuller batch could overtake it, frequent keys would starve rare ones.
        """
        for batch, full in self._batches():
            return self._take(batch) if full else None
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
        for item in batch:
            del self._items[item.task.id]
        return batch

    def _due(self, batch: list[Item], full: bool) -> float:
        return batch[0].enqueued + (0.0 if full else self.max_queue_delay)

    def _batches(self) -> list[tuple[list[Item], bool]]:
        """The first batch of each key and whether it is full, ordered by their oldest items."""
        groups: dict[Hashable, list[Item]] = {}
        for item in self._items.values():
            groups.setdefault(item.key, []).append(item)
        return [self._cut(group) for group in groups.values()]

    def _cut(self, group: list[Item]) -> tuple[list[Item], bool]:
        """The longest start of a group within both bounds, never empty, and whether it is full."""
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


def count_tokens(task: Task, model: Ready, default_template: str) -> int:
    """Estimate the tokens that a task takes in a batch: of all views and all labels.

    The API process has no tokenizer. A prompt counts as one token per three UTF-8 bytes, plus four
    for its ends and prompt slots. All prompts are padded to the longest.
    """
    template = task.template or default_template
    longest = max(len(template.replace("{}", label).encode()) for label in task.labels)
    text = min(model.context_length, 4 + longest // 3)
    return task.views * model.image_tokens + len(task.labels) * text
