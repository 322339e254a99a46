"""The attack demonstration: what undefended CLIP and the defense say after each step."""

import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from service.messages import Answer, Failure, ProgressEvent, Task

DEFENDED_ANSWERS = 10  # how often the defense is asked, evenly spread over the steps
MARGIN = 3  # times the slowest step so far that must be left before the deadline for another step

Ask = Callable[[Task], Answer | Failure]
Settle = Callable[[str, Answer | Failure | ProgressEvent], None]


def run_demo(
    task: Task,
    images: Iterator[NDArray[np.uint8]],
    ask: Ask,
    settle: Settle,
    cancelled: Callable[[str], bool],
) -> None:
    """Report a ProgressEvent for each image, the clean one first, and then the Answer on the last.

    Near the deadline the attack ends early, and the answer is marked as truncated.

    Args:
        images: the image before the attack and after each of its steps.
        ask: answers a task at once.
    """
    assert task.attack is not None
    steps = task.attack.steps
    defended_steps = {
        round(number * steps / DEFENDED_ANSWERS) for number in range(DEFENDED_ANSWERS + 1)
    }
    slowest = 0.0
    for step, image in enumerate(images):
        if cancelled(task.id):
            settle(task.id, Failure("client_gone", "The client left."))
            return
        hurried = time.monotonic() + MARGIN * slowest > task.deadline
        last = step == steps or hurried
        began = time.monotonic()
        alone = replace(
            task,
            image=image,
            view=None,
            attack=None,
            return_views=False,
            method="plain",
            steps=0,
            views=1,
        )
        undefended = ask(replace(alone, readout="single"))
        defended: Answer | Failure | None = None
        if step in defended_steps or last:
            defended = ask(replace(task, image=image, view=None, attack=None, return_views=last))
        for result in (undefended, defended):
            if isinstance(result, Failure):
                settle(task.id, result)
                return
        assert isinstance(undefended, Answer)
        assert not isinstance(defended, Failure)
        scores = None if defended is None else defended.scores
        settle(task.id, ProgressEvent(step, image, undefended.scores, scores))
        slowest = max(slowest, time.monotonic() - began)
        if last and defended is not None:
            cut = "deadline" if step < steps else defended.truncated
            settle(task.id, replace(defended, truncated=cut))
            return
