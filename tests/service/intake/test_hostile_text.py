"""Labels that a tokenizer may stumble over, through a real model: each is answered, those beyond
the context are cut and counted, and none changes what its neighbours are told."""

import base64
import io
import math
import random
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from service.messages import Answer, Failure, Task
from service.settings import Settings
from service.worker.runner import Runner
from tests import tiny
from tests.conftest import Server
from tests.fake_worker import FakeWorker

LONG = "cat dog " * 300
ODD = [
    "\u00df\u0130\u0131",
    "\u0301\u0301\u0301",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467",
    "<|endoftext|>",
    "<|startoftext|><|endoftext|><|pad|>",
    "\ufffd\uffff",
    "\u4e00" * 256,
    "a" * 256,
    "\u0e01\u0e33" * 100,
    "hot\tdog\n",
    "{}",
]


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Runner:
    directory: Path = tiny.save_checkpoint(tmp_path_factory.mktemp("clip"))
    tiny.make_bundle(tiny.load(directory)).save(directory / "bundle")
    return Runner(Settings(model=str(directory), device="cpu"), 0)


def ask(runner: Runner, *label_sets: tuple[str, ...], template: str | None = None) -> list[Answer]:
    """Answers to several label sets in one batch, of one picture and one seed."""
    work = Task(
        id="0",
        image=tiny.draw_image(0),
        labels=(),
        template=template,
        method="tapt",
        steps=1,
        views=4,
        readout="all",
        seed=0,
        deadline=time.monotonic() + 120,
    )
    batch = [replace(work, id=str(i), labels=labels) for i, labels in enumerate(label_sets)]
    settled: dict[str, Answer | Failure] = {}
    runner.run(batch, settled.__setitem__, lambda id: False)
    answers = [settled[work.id] for work in batch]
    assert all(isinstance(answer, Answer) for answer in answers), answers
    return answers  # type: ignore[return-value]


@pytest.mark.parametrize("label", ODD, ids=lambda label: ascii(label[:12]))
def test_an_odd_label_is_answered_and_its_company_unmoved(runner: Runner, label: str) -> None:
    odd, company = ask(runner, (label, "cat"), ("cat", "dog"))
    assert all(math.isfinite(score) for score in odd.scores)
    assert sum(odd.scores) == pytest.approx(1, abs=1e-4)
    (alone,) = ask(runner, ("cat", "dog"))
    assert company.scores == pytest.approx(alone.scores, abs=1e-5)


def test_what_is_beyond_the_context_is_cut_and_counted(runner: Runner) -> None:
    counts = [answer.labels_truncated for answer in ask(runner, ("cat", LONG), ("cat", "dog"))]
    assert counts == [1, 0]
    (both,) = ask(runner, ("cat " + LONG, "dog " + LONG))
    assert both.labels_truncated == 2
    assert both.scores[0] != both.scores[1]
    (template,) = ask(runner, ("cat", "dog"), template=LONG + "{}")
    assert template.labels_truncated == 2


def test_a_client_is_told_of_labels_that_were_cut(
    runner: Runner, start: Callable[..., Server]
) -> None:
    """Within the limit of characters, and beyond the context, as these have several tokens each."""

    def reply(work: Task) -> Answer | Failure:
        settled: dict[str, Answer | Failure] = {}
        runner.run([work], settled.__setitem__, lambda id: False)
        return settled[work.id]

    server = start(FakeWorker(reply, ready=runner.ready))
    buffer = io.BytesIO()
    Image.fromarray(tiny.draw_image(0)).save(buffer, "PNG")
    image = base64.b64encode(buffer.getvalue()).decode()
    for label, cut in (("\u4e00" * 256, 1), ("\u20bf\u16a0" * 100, 1), ("\u4e00", 0)):
        labels = {"candidate_labels": [label, "cat"]}
        native = server.http.post("/v1/classify", json={"image": image} | labels)
        assert native.status_code == 200, native.text
        assert native.json()["defense"]["labels_truncated"] == cut
        hugging = server.http.post("/", json={"inputs": image, "parameters": labels})
        assert hugging.status_code == 200, hugging.text
        assert hugging.headers["x-labels-truncated"] == str(cut)
        assert {each["label"] for each in hugging.json()} == {label, "cat"}  # whole all the same


def test_any_text_is_answered(runner: Runner) -> None:
    draw = random.Random(0)

    def text() -> str:
        points = [draw.choice([0x7F, 0x7FF, 0xD7FF, 0x10FFFF]) for _ in range(draw.randint(1, 40))]
        text = "".join(chr(draw.randint(1, most)) for most in points)
        return text.encode(errors="ignore").decode()

    for _ in range(10):
        answers = ask(runner, *((text() or "a", text() or "b") for _ in range(4)))
        assert all(math.isfinite(score) for answer in answers for score in answer.scores)
