"""Which label sets need no encoding, as far as the API process can tell."""

from collections import OrderedDict
from collections.abc import Hashable

from models.defenses.catalog import DEFENSES
from service.messages import Task

MAX_LABELS = 8192
"""Labels of all sets together. A worker caches at least as many: 64 MiB, at most 6 KB for the
features and tokens of each label of the largest CLIP models."""


class LabelSets:
    """The label sets of the last answers, which the workers still have in their text caches.

    With several workers a set may be encoded once more by each.
    """

    def __init__(self, max_labels: int = MAX_LABELS) -> None:
        self._max_labels = max_labels
        self._sizes: OrderedDict[Hashable, int] = OrderedDict()
        self._labels = 0

    def __contains__(self, task: Task) -> bool:
        return _key(task) in self._sizes

    def add(self, task: Task) -> None:
        """Remember the labels of a task that was answered."""
        key = _key(task)
        if key not in self._sizes:
            self._sizes[key] = len(task.labels)
            self._labels += len(task.labels)
        self._sizes.move_to_end(key)
        while self._labels > self._max_labels:
            self._labels -= self._sizes.popitem(last=False)[1]

    def clear(self) -> None:
        """Forget all, because a worker was lost with its cache."""
        self._sizes.clear()
        self._labels = 0


def _key(task: Task) -> Hashable:
    """What a worker's cache looks features up by."""
    return DEFENSES[task.method].prompts, task.template, task.labels
