"""When each request of a batch stops adapting."""

import time
from collections.abc import Callable, Sequence

import torch

from models.device import catch_up
from models.tapt import Exit
from service.messages import Task

Cancelled = Callable[[str], bool]
"""Whether the client of the task with this id is gone."""


class Pacer:
    """Lets requests leave the loop after their steps, near their deadline, or when cancelled.

    Called at each step boundary, as `models.tapt.Leaving`.

    Attributes:
        last_step: `time.monotonic()` of the last step boundary.
        late: rows that left near their deadline, before their steps were done.

    Args:
        steps: the steps that each task takes.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        steps: Sequence[int],
        cancelled: Cancelled,
        device: torch.device,
    ) -> None:
        self._tasks, self._steps = tasks, steps
        self._cancelled, self._device = cancelled, device
        self._readout: float | None = None
        self.last_step = time.monotonic()
        self.late: set[int] = set()

    def __call__(self, steps: int, rows: list[int]) -> Exit:
        catch_up(self._device)  # otherwise the clock would see only the launch of the work
        now = time.monotonic()
        step, self.last_step = now - self.last_step, now
        # The first look at all views takes about as long as the readout, and at least as a step.
        self._readout = step if self._readout is None else self._readout
        dropped = {row for row in rows if self._cancelled(self._tasks[row].id)}
        ready = now + step + self._readout  # if another step is taken
        adapting = {row for row in rows if steps < self._steps[row]} - dropped
        late = {row for row in adapting if ready > self._tasks[row].deadline}
        self.late |= late
        return Exit(set(rows) - dropped - (adapting - late), dropped)
