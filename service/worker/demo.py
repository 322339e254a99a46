"""Inside the worker: an attack step by step, and what is said of each step's picture.

Pure: the pictures and the way to ask about one are handed in.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from service.messages import Answer, Failure, ProgressEvent, Task

LOOKS = 10  # times that the defense is asked, evenly spread over the steps
MARGIN = 3  # looks that must still fit before the deadline for another step to be taken

Ask = Callable[[Task], Answer | Failure]
Settle = Callable[[str, Answer | Failure | ProgressEvent], None]


def run_demo(
    work: Task,
    pictures: Iterator[NDArray[np.uint8]],
    ask: Ask,
    settle: Settle,
    cancelled: Callable[[str], bool],
) -> None:
    """Report a Glimpse of each picture, the clean one first, and then the Answer on the last.

    Short of time it stops early, and says so in the answer.
    """
    assert work.attack is not None
    steps = work.attack.steps
    looks = {round(look * steps / LOOKS) for look in range(LOOKS + 1)}
    slowest = 0.0
    for step, picture in enumerate(pictures):
        if cancelled(work.id):
            settle(work.id, Failure("client_gone", "The client left."))
            return
        hurried = time.monotonic() + MARGIN * slowest > work.deadline
        last = step == steps or hurried
        began = time.monotonic()
        alone = replace(
            work, image=picture, attack=None, return_views=False, method="plain", steps=0, views=1
        )
        undefended = ask(replace(alone, readout="single"))
        defended: Answer | Failure | None = None
        if step in looks or last:
            defended = ask(replace(work, image=picture, attack=None, return_views=last))
        for result in (undefended, defended):
            if isinstance(result, Failure):
                settle(work.id, result)
                return
        assert isinstance(undefended, Answer)
        assert not isinstance(defended, Failure)
        scores = None if defended is None else defended.scores
        settle(work.id, ProgressEvent(step, picture, undefended.scores, scores))
        slowest = max(slowest, time.monotonic() - began)
        if last and defended is not None:
            cut = "deadline" if step < steps else defended.truncated
            settle(work.id, replace(defended, truncated=cut))
            return
