"""When each request of a batch stops adapting."""

import time
from collections.abc import Callable, Sequence

import torch

from models.device import catch_up
from service.messages import Task, Truncation

Cancelled = Callable[[str], bool]
"""Whether the client of the task with this id is gone."""


class Pacer:
    """Lets requests leave the loop after their steps, near their deadline, or when cancelled.

    Called at each step boundary, as `models.tapt.Leaving`.

    Attributes:
        last_step: `time.monotonic()` of the last step boundary.
        truncated: why a request left before its steps were done, by row.

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
        self.truncated: dict[int, Truncation] = {}

    def __call__(self, steps: int, rows: list[int]) -> set[int]:
        catch_up(self._device)  # otherwise the clock would see only the launch of the work
        now = time.monotonic()
        step, self.last_step = now - self.last_step, now
        # The first look at all views takes about as long as the readout, and at least as a step.
        self._readout = step if self._readout is None else self._readout
        gone = set()
        for row in rows:
            task = self._tasks[row]
            if self._cancelled(task.id):
                self.truncated[row] = "cancelled"
            elif steps < self._steps[row]:
                if now + step + self._readout <= task.deadline:
                    continue
                self.truncated[row] = "deadline"
            gone.add(row)
        return gone
