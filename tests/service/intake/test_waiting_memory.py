"""What a request that waits for its batch no longer holds: its body and its image file."""

import base64
import json
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest

from service.http.routes import classify, demo, huggingface
from service.intake.intake import Intake
from service.intake.multipart import read_form
from service.intake.requests import TextLimits
from tests.conftest import Server
from tests.fake_worker import FakeWorker

LABELS = ["cat", "dog"]


class _Token:
    pass


class Tracked(bytes):
    """Bytes whose end can be observed through an attribute: bytes take no weak references."""

    token: _Token


def track(value: bytes, seen: "list[weakref.ref[_Token]]") -> Tracked:
    tracked = Tracked(value)
    tracked.token = _Token()
    seen.append(weakref.ref(tracked.token))
    return tracked


def as_json(photo: bytes) -> dict[str, Any]:
    return {"json": {"image": base64.b64encode(photo).decode(), "candidate_labels": LABELS}}


def as_form(photo: bytes) -> dict[str, Any]:
    return {"files": {"image": photo}, "data": {"labels": "cat,dog"}}


def as_hugging_face(photo: bytes) -> dict[str, Any]:
    image = base64.b64encode(photo).decode()
    return {"json": {"inputs": image, "parameters": {"candidate_labels": LABELS}}}


@pytest.mark.parametrize(
    ("path", "ask"),
    [
        ("/v1/classify", as_json),
        ("/v1/classify", as_form),
        ("/", as_hugging_face),
        ("/demo/classify", as_json),
    ],
    ids=["JSON", "form", "Hugging Face", "demo"],
)
def test_a_waiting_request_holds_neither_its_body_nor_its_file(
    start: Callable[..., Server],
    photo: bytes,
    monkeypatch: pytest.MonkeyPatch,
    path: str,
    ask: Callable[[bytes], dict[str, Any]],
) -> None:
    bodies: list[weakref.ref[_Token]] = []
    files: list[weakref.ref[_Token]] = []
    receive = Intake._receive

    async def receive_tracked(*arguments: Any) -> bytes:
        return track(await receive(*arguments), bodies)

    def read_tracked_form(*arguments: Any) -> tuple[bytes, dict[str, Any]]:
        file, fields = read_form(*arguments)
        return track(file, files), fields

    def decode_tracked(text: str) -> bytes:
        return track(base64.b64decode(text), files)

    monkeypatch.setattr(Intake, "_receive", receive_tracked)
    monkeypatch.setattr(classify, "read_form", read_tracked_form)
    monkeypatch.setattr(classify, "read_source", decode_tracked)
    monkeypatch.setattr(huggingface, "read_source", decode_tracked)
    monkeypatch.setattr(demo, "from_base64", decode_tracked)

    worker = FakeWorker(automatic=False)

    def finish() -> None:
        if worker.busy:
            worker.finish()

    server = start(worker, max_batch_size=1, enable_attack_demo=True)
    server.call(worker.be_ready)
    server.wait(lambda: server.app.state.intake.decoders.ready)
    with ThreadPoolExecutor(3) as pool:
        asked = [pool.submit(server.http.post, path, **ask(photo)) for _ in range(3)]
        # One runs, one waits in the worker, one in the queue.
        server.wait(lambda: len(server.app.state.engine._requests) == 3)
        held = server.call(lambda: [ref() for ref in (*bodies, *files)])
        while not all(answer.done() for answer in asked):
            server.call(finish)
        assert [answer.result().status_code for answer in asked] == [200] * 3
    assert held == [None] * 6


@pytest.mark.parametrize(
    "read", [partial(classify._read, content_type="application/json"), demo._read_classify]
)
def test_the_options_of_a_json_body_do_not_hold_the_image(
    photo: bytes, read: Callable[..., Any]
) -> None:
    asked = as_json(photo)["json"]
    file, options = read(json.dumps(asked).encode(), limits=TextLimits())
    assert file == photo
    assert options.candidate_labels == LABELS
    assert asked["image"] not in repr(options)
