"""The worker on a CUDA device; loudly skipped where there is none."""

import time

import numpy as np
import pytest
import torch

from models.images.preprocess import Preprocessing
from models.preprocessing import OPENAI_MEAN, OPENAI_STD
from models.views import make_batch_views
from service.messages import Answer, Task
from service.settings import Settings
from service.worker.runner import Runner
from tests import tiny

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no CUDA device here: the GPU paths were not tried"
)


def answer(runner: Runner, count: int) -> list[Answer]:
    """The answers to a batch of different pictures with the same seeds on every device."""
    batch = [
        Task(
            id=str(number),
            image=tiny.draw_image(number),
            labels=("espresso", "dog", "school bus", "lemon")[: 2 + number % 3],
            template=None,
            method="tapt",
            steps=1,
            views=16,
            readout="all",
            seed=number,
            deadline=time.monotonic() + 60,
        )
        for number in range(count)
    ]
    settled: dict[str, object] = {}
    runner.run(batch, settled.__setitem__, lambda _: False)
    answers = [settled[work.id] for work in batch]
    assert all(isinstance(one, Answer) for one in answers)
    return answers  # type: ignore[return-value]


def test_views_made_together_on_the_gpu_are_those_made_one_by_one_on_the_cpu() -> None:
    images = [tiny.draw_image(number, 60 + 20 * (number % 2), 80) for number in range(6)]
    preprocessing = Preprocessing(32, 32, None, 3, OPENAI_MEAN, OPENAI_STD)
    near, far = (
        make_batch_views(images, 16, range(6), preprocessing, torch.device(device))
        for device in ("cpu", "cuda")
    )
    assert ((near - far.cpu()).abs() > 1e-6).double().mean() < 1e-3
    assert (near - far.cpu()).abs().max() < 1.5 / 255


def test_float32_on_the_gpu_answers_as_on_the_cpu() -> None:
    near, far = (
        answer(Runner(Settings(device=device, dtype="float32"), 0), 8) for device in ("cpu", "cuda")
    )
    for one, other in zip(near, far, strict=True):
        assert one.scores == pytest.approx(other.scores, abs=2e-3)


def test_bfloat16_agrees_on_the_labels() -> None:
    single, half = (
        answer(Runner(Settings(model="embedded", device="cuda", dtype=dtype), 0), 64)
        for dtype in ("float32", "bfloat16")
    )
    # Where two labels are a hair apart, rounding may choose.
    clear = [
        (np.argmax(one.scores), np.argmax(other.scores))
        for one, other in zip(single, half, strict=True)
        if np.ptp(np.sort(one.scores)[-2:]) > 0.05
    ]
    assert len(clear) >= 16
    assert sum(one == other for one, other in clear) >= 0.99 * len(clear)


def test_the_budget_follows_the_free_memory() -> None:
    runner = Runner(Settings(device="cuda"), 0)
    assert runner.ready.max_batch_tokens > 2**16
    assert runner.memory_bytes() > 0
