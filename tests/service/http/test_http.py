"""The HTTP contract, over a real socket."""

import asyncio
import base64
import io
import json
import logging
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from importlib.metadata import version
from typing import Any

import httpx
import pytest
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from service.errors import Unprocessable
from service.http.authentication import entry
from service.http.response import Classification
from service.intake.image_urls import ImageURL
from service.intake.requests import DefenseOptions
from service.messages import Answer, Failure, Task
from service.server import listen
from service.settings import TIERS, Settings
from service.telemetry.metrics import SECONDS
from tests.conftest import Server
from tests.fake_worker import READY, FakeWorker, answer

pytestmark = pytest.mark.alone

LABELS = ["cat", "dog", "horse"]
START = Callable[..., Server]


def as_json(photo: bytes, **fields: Any) -> dict[str, Any]:
    return {"image": base64.b64encode(photo).decode(), "candidate_labels": LABELS} | fields


def assert_error(answer: httpx.Response, status: int, error_type: str) -> str:
    """The one shape of every error; its sentence."""
    assert answer.status_code == status, answer.text
    body = answer.json()
    assert body.keys() == {"error", "error_type", "request_id"}
    assert body["error_type"] == error_type
    assert body["request_id"] == answer.headers["x-request-id"]
    assert body["error"].endswith(".")
    assert "Traceback" not in answer.text
    sentence: str = body["error"]
    return sentence


# The native route.


def test_an_answer_does_not_wait_for_the_acknowledgment_of_its_head() -> None:
    with (
        listen("127.0.0.1", 0) as listener,
        socket.create_connection(listener.getsockname()),
        listener.accept()[0] as accepted,
    ):
        assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_the_answer_has_exactly_the_documented_fields(server: Server, photo: bytes) -> None:
    answer = server.http.post("/v1/classify", json=as_json(photo))
    assert answer.status_code == 200
    body = answer.json()
    assert body.keys() == {"id", "model", "labels", "defense", "timings_ms"}
    assert body["defense"].keys() == {
        "tier", "method", "design", "steps", "views", "views_kept", "readout", "truncated",
        "labels_truncated", "entropy_before", "entropy_after", "agreement", "suspicion",
        "suspected", "undefended_label",
    }  # fmt: skip
    assert body["timings_ms"].keys() == {"queue", "decode", "adapt", "predict", "total"}
    assert body["labels"][0] == {"label": "cat", "score": 1.0}
    assert body["id"] == answer.headers["x-request-id"]
    assert body["model"] == "fake"
    assert body["timings_ms"]["adapt"] == 10.0
    Classification.model_validate(body, strict=True)


def test_labels_are_ranked_and_cut_to_top_k(start: START, photo: bytes) -> None:
    def reply(work: Task) -> Answer:
        return replaced(answer(work), scores=[0.2, 0.5, 0.3])

    server = start(FakeWorker(reply))
    cases: list[tuple[int | None, list[Any]]] = [
        (1, ["dog"]),
        (9, ["dog", "horse", "cat"]),
        (None, 3 * [...]),
    ]
    for top_k, expected in cases:
        body = server.http.post("/v1/classify", json=as_json(photo, top_k=top_k)).json()
        assert len(body["labels"]) == len(expected)
        assert [scored["label"] for scored in body["labels"]][: top_k or 0] == (
            expected[: top_k or 0]
        )
    assert body["defense"]["undefended_label"] == "cat"


@pytest.mark.parametrize(
    ("expose", "scores"),
    [
        ("full", [("dog", 0.456), ("cat", 0.321), ("horse", 0.223)]),
        ("rounded", [("dog", 0.46), ("cat", 0.32), ("horse", 0.22)]),
        ("label", [("dog", 1.0), ("horse", 0.0), ("cat", 0.0)]),
    ],
)
def test_expose_limits_what_leaves(
    start: START, photo: bytes, expose: str, scores: list[tuple[str, float]]
) -> None:
    def reply(work: Task) -> Answer:
        return replaced(answer(work), scores=[0.223, 0.456, 0.321], entropy_after=0.987654)

    server = start(FakeWorker(reply), expose=expose)
    sent = as_json(photo, candidate_labels=["horse", "dog", "cat"])
    body = server.http.post("/v1/classify", json=sent).json()
    assert [(scored["label"], scored["score"]) for scored in body["labels"]] == scores
    assert body["defense"]["entropy_after"] == {
        "full": 0.987654, "rounded": 0.99, "label": None
    }[expose]  # fmt: skip
    assert (body["defense"]["undefended_label"] is None) == (expose == "label")


def replaced(answer: Answer, **fields: Any) -> Answer:
    import dataclasses

    return dataclasses.replace(answer, **fields)


FORMS: dict[str, list[tuple[str, str]]] = {
    "repeated": [("labels", label) for label in LABELS],
    "comma-separated": [("labels", "cat, dog,horse ")],
    "JSON array": [("labels", '["cat", "dog", "horse"]')],
    "candidate_labels": [("candidate_labels", "cat,dog,horse")],
}


@pytest.mark.parametrize("fields", FORMS.values(), ids=FORMS)
def test_labels_of_a_form(server: Server, photo: bytes, fields: list[tuple[str, str]]) -> None:
    parts = [(name, (None, value)) for name, value in fields]
    answer = server.http.post("/v1/classify", files=[("image", ("a.jpg", photo)), *parts])
    assert answer.status_code == 200, answer.text
    assert server.worker.batches[-1][0].labels == ("cat", "dog", "horse")


@pytest.mark.parametrize("nested", [True, False])
def test_everything_else_of_a_form(server: Server, photo: bytes, nested: bool) -> None:
    defense = {"method": "tapt", "steps": 2, "views": 8, "readout": "kept", "deadline_ms": 9000.5}
    fields = {"labels": "cat,dog", "top_k": "1", "hypothesis_template": "une photo, {}", "seed": ""}
    fields |= {"defense": json.dumps(defense)} if nested else {k: str(defense[k]) for k in defense}
    answer = server.http.post("/v1/classify", files={"image": photo}, data=fields)
    assert answer.status_code == 200, answer.text
    work = server.worker.batches[-1][0]
    assert (work.method, work.steps, work.views, work.readout) == ("tapt", 2, 8, "kept")
    assert work.template == "une photo, {}"
    assert 8 < work.deadline - time.monotonic() < 9.1
    assert len(answer.json()["labels"]) == 1


def test_a_large_form_stays_in_memory(start: START, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a temporary file")

    monkeypatch.setattr("tempfile.SpooledTemporaryFile", forbidden)
    monkeypatch.setattr("tempfile.TemporaryFile", forbidden)
    buffer = io.BytesIO()
    Image.effect_noise((1400, 1400), 100).save(buffer, "PNG")
    assert buffer.tell() > 2**20
    answer = start().http.post(
        "/v1/classify", files={"image": buffer.getvalue()}, data={"labels": "a,b"}
    )
    assert answer.status_code == 200


@pytest.mark.parametrize(
    "encode",
    [
        lambda text: text,
        lambda text: "data:image/jpeg;base64," + text,
        lambda text: "DATA:;charset=x;BASE64,\n " + text,
        lambda text: text.replace("+", "-").replace("/", "_").rstrip("="),
        lambda text: "\n".join(text[i : i + 76] for i in range(0, len(text), 76)) + "\n",
    ],
    ids=["plain", "data URI", "odd data URI", "URL-safe", "lines"],
)
def test_base64_in_its_forms(server: Server, photo: bytes, encode: Callable[[str], str]) -> None:
    text = encode(base64.b64encode(photo).decode())
    answer = server.http.post("/v1/classify", json=as_json(photo, image=text))
    assert answer.status_code == 200, answer.text
    assert server.worker.batches[-1][0].image.shape == (300, 451, 3)


def test_what_is_above_a_limit_is_clamped_and_reported(start: START, photo: bytes) -> None:
    server = start(max_steps=3, max_views=32, request_timeout_ms=5000)
    defense = {"steps": 1000, "views": 1000, "deadline_ms": 1e12}
    body = server.http.post("/v1/classify", json=as_json(photo, defense=defense)).json()
    assert (body["defense"]["steps"], body["defense"]["views"]) == (3, 32)
    assert server.worker.batches[-1][0].deadline - time.monotonic() < 5


@pytest.mark.parametrize(
    ("highest", "asked", "granted", "spent"),
    [
        ("deep", {}, "standard", ("tapt", 2, 10)),
        ("deep", {"tier": "fast"}, "fast", ("ensemble", 0, 5)),
        ("deep", {"tier": "deep"}, "deep", ("tapt", 4, 40)),
        ("standard", {"tier": "deep"}, "standard", ("tapt", 2, 10)),
        ("deep", {"tier": "fast", "method": "tapt", "views": 3}, "fast", ("tapt", 2, 3)),
        ("deep", {"tier": "deep", "steps": 1}, "deep", ("tapt", 1, 40)),
        # What a request names is no matter of tiers.
        (
            "fast",
            {"tier": "deep", "method": "tapt", "views": 99, "steps": 99},
            "fast",
            ("tapt", 8, 64),
        ),
    ],
)
def test_a_tier_says_what_is_spent_where_the_request_does_not(
    start: START,
    photo: bytes,
    highest: str,
    asked: dict[str, Any],
    granted: str,
    spent: tuple[str, int, int],
) -> None:
    tier = min("standard", highest, key=TIERS.index)
    server = start(tier=tier, max_tier=highest, steps=2, views=10)
    body = server.http.post("/v1/classify", json=as_json(photo, defense=asked)).json()
    assert body["defense"]["tier"] == granted
    work = server.worker.batches[-1][0]
    assert (work.method, work.steps, work.views) == spent


@pytest.mark.parametrize(
    ("method", "asked", "given"),
    [
        ("plain", 5, (0, 1, "single")),
        ("apt", 5, (0, 1, "single")),
        ("ensemble", 5, (0, 9, "all")),
        ("tapt", 0, (0, 9, "kept")),
        ("rtpt", 5, (5, 9, "weighted")),
        ("ttc", None, (2, 1, "single")),
        ("mac", None, (4, 1, "all")),
    ],
)
def test_a_method_gets_only_what_it_uses(
    server: Server, photo: bytes, method: str, asked: int | None, given: tuple[int, int, str]
) -> None:
    defense = {"method": method, "steps": asked, "views": 9, "readout": "kept"}
    assert server.http.post("/v1/classify", json=as_json(photo, defense=defense)).is_success
    work = server.worker.batches[-1][0]
    assert (work.method, (work.steps, work.views, work.readout)) == (method, given)


def test_the_readout_that_was_used_is_reported(start: START, photo: bytes) -> None:
    """A defense may leave the request's on some images."""
    server = start(FakeWorker(lambda work: replaced(answer(work), readout="single")))
    defense = {"method": "gate", "readout": "kept"}
    got = server.http.post("/v1/classify", json=as_json(photo, defense=defense))
    assert server.worker.batches[-1][0].readout == "kept"
    assert got.json()["defense"]["readout"] == "single"


def test_views_are_secret_unless_the_operator_says_otherwise(start: START, photo: bytes) -> None:
    seeded = as_json(photo, defense={"seed": 7})
    server = start()
    assert "seed" in assert_error(
        server.http.post("/v1/classify", json=seeded), 422, "unprocessable"
    )
    open_server = start(allow_client_seed=True)
    for one in (server, open_server):
        assert one.http.post("/v1/classify", json=as_json(photo)).is_success
    first, second = (one.worker.batches[0][0].seed for one in (server, open_server))
    assert first != second  # each process has a secret of its own
    assert open_server.http.post("/v1/classify", json=seeded).is_success
    assert open_server.worker.batches[-1][0].seed == 7


# What is refused, and how.

UNPROCESSABLE: dict[str, dict[str, Any]] = {
    "one label": {"candidate_labels": ["cat"]},
    "no label": {"candidate_labels": []},
    "blank label": {"candidate_labels": ["cat", " "]},
    "repeated label": {"candidate_labels": ["cat", "cat "]},
    "labels are numbers": {"candidate_labels": [1, 2]},
    "labels are null": {"candidate_labels": None},
    "too many labels": {"candidate_labels": [str(i) for i in range(1001)]},
    "long label": {"candidate_labels": ["cat", "x" * 257]},
    "template without braces": {"hypothesis_template": "a photo"},
    "template with two": {"hypothesis_template": "{} {}"},
    "template with a name": {"hypothesis_template": "{label} {}"},
    "template with a stray brace": {"hypothesis_template": "{} }"},
    "template is empty": {"hypothesis_template": ""},
    "top_k is zero": {"top_k": 0},
    "top_k is true": {"top_k": True},
    "steps below zero": {"defense": {"steps": -1}},
    "steps are a float": {"defense": {"steps": 1.0}},
    "steps are text": {"defense": {"steps": "1"}},
    "steps are true": {"defense": {"steps": True}},
    "no views": {"defense": {"views": 0}},
    "deadline below zero": {"defense": {"deadline_ms": -5}},
    "deadline is text": {"defense": {"deadline_ms": "soon"}},
    "unknown method": {"defense": {"method": "magic"}},
    "unknown tier": {"defense": {"tier": "lavish"}},
    "unknown readout": {"defense": {"readout": "magic"}},
    "huge seed": {"defense": {"seed": 2**70}},
    "unknown field": {"labls": ["a", "b"]},
    "unknown defense field": {"defense": {"step": 1}},
    "defense is a list": {"defense": []},
    "image is a URL": {"image": "https://example.org/cat.jpg"},
    "image is null": {"image": None},
    "image is a number": {"image": 5},
}


@pytest.mark.parametrize("fields", UNPROCESSABLE.values(), ids=UNPROCESSABLE)
def test_what_makes_no_sense_is_422(server: Server, photo: bytes, fields: dict[str, Any]) -> None:
    answer = server.http.post("/v1/classify", json=as_json(photo, **fields))
    assert_error(answer, 422, "unprocessable")


@pytest.mark.parametrize("missing", ["image", "candidate_labels"])
def test_a_missing_field_is_named(server: Server, photo: bytes, missing: str) -> None:
    body = as_json(photo)
    del body[missing]
    answer = server.http.post("/v1/classify", json=body)
    assert f"`{missing}`" in assert_error(answer, 422, "unprocessable")


BOUNDARY = "multipart/form-data; boundary=x"
MALFORMED: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "application/json"),
    "not JSON": (b"{", "application/json"),
    "not a number": (b'{"candidate_labels": NAN}', "application/json"),
    "lone surrogate": (b'{"image": "\\ud800"}', "application/json"),
    "not UTF-8": (b'{"image": "\xff"}', "application/json"),
    "deep": (b"[" * 100_000, "application/json"),
    "no boundary": (b"--x\r\n\r\n--x--", "multipart/form-data"),
    "not a form": (b"hello", BOUNDARY),
    "form cut short": (b'--x\r\nContent-Disposition: form-data; name="image"\r\n\r\nabc', BOUNDARY),
    "label not UTF-8": (
        b'--x\r\nContent-Disposition: form-data; name="image"\r\n\r\nabc\r\n'
        b'--x\r\nContent-Disposition: form-data; name="labels"\r\n\r\n\xff,b\r\n--x--\r\n',
        BOUNDARY,
    ),
}


@pytest.mark.parametrize(("body", "content_type"), MALFORMED.values(), ids=MALFORMED)
def test_malformed_bodies_are_400(server: Server, body: bytes, content_type: str) -> None:
    headers = {"Content-Type": content_type}
    assert_error(
        server.http.post("/v1/classify", content=body, headers=headers), 400, "bad_request"
    )


@pytest.mark.parametrize(
    "text", ["?", "abcde", "data:image/png,abcd", "data:;base64", "éé==", "a" * 5 + "\0aa"]
)
def test_malformed_base64_is_400(server: Server, photo: bytes, text: str) -> None:
    answer = server.http.post("/v1/classify", json=as_json(photo, image=text))
    assert_error(answer, 400, "bad_request")


@pytest.mark.parametrize("literal", ["NaN", "Infinity", "1e999"])
def test_a_deadline_that_is_no_number(server: Server, photo: bytes, literal: str) -> None:
    text = json.dumps(as_json(photo, defense={"deadline_ms": 123454321}))
    answer = server.http.post("/v1/classify", content=text.replace("123454321", literal))
    assert answer.status_code in {400, 422}
    assert_error(answer, answer.status_code, answer.json()["error_type"])


def test_forms_are_as_strict(server: Server, photo: bytes) -> None:
    def post(data: dict[str, Any], **files: Any) -> httpx.Response:
        parts = {"image": photo} | files
        return server.http.post("/v1/classify", files=parts, data={"labels": "a,b"} | data)

    assert_error(post({"steps": "-1"}), 422, "unprocessable")
    assert_error(post({"steps": "1.5"}), 422, "unprocessable")
    assert_error(post({"steps": "many"}), 422, "unprocessable")
    assert_error(post({"steps": "1", "defense": '{"steps": 1}'}), 422, "unprocessable")
    assert_error(post({"steps": ["1", "2"]}), 422, "unprocessable")
    assert_error(post({"defense": "[1"}), 400, "bad_request")
    assert_error(post({"labels": "[1"}), 400, "bad_request")
    assert_error(post({"labels": [str(i) for i in range(1100)]}), 422, "unprocessable")
    assert "`color`" in assert_error(post({"color": "red"}), 422, "unprocessable")
    assert_error(
        server.http.post("/v1/classify", files={"labels": (None, "a,b")}), 422, "unprocessable"
    )


@pytest.mark.parametrize(
    ("image", "status", "error_type"),
    [
        (b"", 400, "bad_request"),
        (b"hello", 415, "unsupported_image"),
        (b"\x89PNG\r\n\x1a\n", 400, "bad_request"),
    ],
)
def test_bad_images(server: Server, image: bytes, status: int, error_type: str) -> None:
    assert_error(server.http.post("/v1/classify", json=as_json(image)), status, error_type)


def test_too_many_pixels(start: START, photo: bytes) -> None:
    server = start(max_image_pixels=1000)
    assert_error(server.http.post("/v1/classify", json=as_json(photo)), 413, "too_large")


@pytest.mark.parametrize(
    "path", ["/nope", "/v1/classify/", "/docs/../../etc/passwd", "/playground/x"]
)
def test_unknown_addresses(server: Server, path: str) -> None:
    assert_error(server.http.get(path), 404, "not_found")


def test_wrong_methods(server: Server) -> None:
    answer = server.http.get("/v1/classify")
    assert_error(answer, 405, "method_not_allowed")
    assert answer.headers["allow"] == "POST"
    assert_error(server.http.post("/info"), 405, "method_not_allowed")


def test_a_fault_of_ours_tells_nothing(
    start: START, photo: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any) -> None:
        raise RuntimeError("the secret of the house")

    monkeypatch.setattr("service.http.routes.classify.build_response", fail)
    answer = start().http.post("/v1/classify", json=as_json(photo))
    assert_error(answer, 500, "internal")
    assert "secret" not in answer.text


@pytest.mark.parametrize(
    ("given", "kept"),
    [("abc-123", True), ("x" * 128, True), ("x" * 129, False), ("a b", False), ("é", False)],
)
def test_request_ids(server: Server, given: str, kept: bool) -> None:
    for path in ("/livez", "/nope"):
        echo = server.http.get(path, headers={b"X-Request-Id": given.encode("latin-1")})
        assert (echo.headers["x-request-id"] == given) is kept
        assert echo.headers["x-request-id"].isascii()


# Keys.


def test_keys_guard_the_api_and_not_the_health(start: START, photo: bytes) -> None:
    server = start(api_keys="alpha,beta")
    for request in (
        {"method": "POST", "url": "/v1/classify", "json": as_json(photo)},
        {"method": "POST", "url": "/", "json": {"inputs": "", "parameters": {}}},
        {"method": "GET", "url": "/metrics"},
        {"method": "GET", "url": "/info"},
    ):
        for header in ({}, {"Authorization": "Bearer gamma"}, {"Authorization": "Basic alpha"}):
            answer = server.http.request(**request, headers=header)
            assert_error(answer, 401, "unauthorized")
            assert answer.headers["www-authenticate"] == "Bearer"
        header = {"Authorization": "bearer beta"}
        answer = server.http.request(**request, headers=header)
        assert answer.status_code != 401
    for path in ("/livez", "/readyz", "/startupz", "/health"):
        assert server.http.get(path).status_code == 200
    answer = server.http.get("/info", headers={"Authorization": "Bearer alpha"})
    assert answer.json()["policies"]["keys"] is True
    assert "alpha" not in answer.text


# The body on its way.


def test_a_declared_length_over_the_limit_is_refused_unread(start: START) -> None:
    server = start(max_body_bytes=5000)
    with socket.create_connection(("127.0.0.1", server.port)) as client:
        client.sendall(b"POST /v1/classify HTTP/1.1\r\nHost: x\r\nContent-Length: 5001\r\n\r\n")
        assert client.recv(4096).startswith(b"HTTP/1.1 413 ")


def test_a_whole_body_over_the_limit_gets_its_answer(start: START) -> None:
    server = start(max_body_bytes=5000)
    assert_error(server.http.post("/v1/classify", content=b"x" * 3_000_000), 413, "too_large")


def test_a_chunked_body_is_cut_at_the_limit(start: START) -> None:
    server = start(max_body_bytes=5000)

    def chunks() -> Iterator[bytes]:
        for _ in range(100):
            yield b"x" * 1000

    assert_error(server.http.post("/v1/classify", content=chunks()), 413, "too_large")


def test_a_slow_upload_holds_no_slot_and_times_out(start: START, photo: bytes) -> None:
    server = start(upload_timeout_ms=300, max_queue_size=1)
    with socket.create_connection(("127.0.0.1", server.port)) as client:
        client.sendall(b"POST /v1/classify HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\n{")
        # Were it in the queue, the only place would be taken.
        assert server.http.post("/v1/classify", json=as_json(photo)).is_success
        client.settimeout(10)
        assert client.recv(4096).startswith(b"HTTP/1.1 408 ")


def test_a_client_that_leaves_frees_its_place(start: START, photo: bytes) -> None:
    worker = FakeWorker(automatic=False)
    server = start(worker, max_queue_size=1)
    server.call(worker.be_ready)
    body = json.dumps(as_json(photo)).encode()
    head = b"POST /v1/classify HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body)
    with socket.create_connection(("127.0.0.1", server.port)) as client:
        client.sendall(head + body)
        server.wait(lambda: worker.batches)
    server.wait(lambda: worker.cancelled)
    server.wait(lambda: 'code="499"' in metrics_of(server))
    assert server.call(lambda: server.app.state.engine.queue_depth) == 0


def test_a_full_queue_is_429(start: START, photo: bytes) -> None:
    worker = FakeWorker(automatic=False)
    server = start(worker, max_queue_size=1)
    server.call(worker.be_ready)

    engine = server.app.state.engine
    with ThreadPoolExecutor() as clients:

        def post() -> Future[httpx.Response]:
            return clients.submit(server.http.post, "/v1/classify", json=as_json(photo))

        first = post()
        server.wait(lambda: worker.batches)
        second = post()
        server.wait(lambda: engine.queue_depth == 1)
        refused = post().result()
        server.call(worker.finish)
        server.wait(lambda: len(worker.batches) == 2)
        server.call(worker.finish)
        assert first.result().is_success
        assert second.result().is_success
    assert_error(refused, 429, "queue_full")
    assert int(refused.headers["retry-after"]) >= 1


def test_failures_of_the_worker_keep_their_type(start: START, photo: bytes) -> None:
    server = start(FakeWorker(lambda work: Failure("deadline", "Too late.")))
    assert_error(server.http.post("/v1/classify", json=as_json(photo)), 504, "deadline")


@pytest.mark.parametrize(
    ("defense", "own"),
    [(None, 0), ({"deadline_ms": 60_000}, 0), ({"deadline_ms": 59_999}, 1)],
    ids=["none", "the server's", "shorter"],
)
def test_a_504_at_the_deadline_that_the_client_chose_is_counted_apart(
    start: START, photo: bytes, defense: dict[str, Any] | None, own: int
) -> None:
    """The alerts subtract it from the failures of the service."""
    server = start(FakeWorker(lambda work: Failure("deadline", "Too late.")))
    body = as_json(photo, defense=defense)
    assert_error(server.http.post("/v1/classify", json=body), 504, "deadline")
    counted = server.http.get("/metrics").text
    assert 'tapt_requests_total{code="504",route="/v1/classify"} 1.0' in counted
    assert counted.count('tapt_rejected_total{reason="client_deadline"} 1.0') == own


# Health, facts, documents.


def test_health_follows_the_worker(start: START, photo: bytes) -> None:
    worker = FakeWorker(automatic=False)
    server = start(worker)

    def codes() -> list[int]:
        paths = ("/livez", "/startupz", "/readyz", "/health")
        return [server.http.get(path).status_code for path in paths]

    assert codes() == [200, 503, 503, 503]
    answer = server.http.get("/readyz")
    assert_error(answer, 503, "not_ready")
    assert int(answer.headers["retry-after"]) >= 1
    answer = server.http.post("/v1/classify", json=as_json(photo))
    assert_error(answer, 503, "not_ready")
    assert int(answer.headers["retry-after"]) >= 1

    server.call(worker.be_ready)
    server.wait(lambda: server.app.state.intake.decoders.ready)
    assert codes() == [200, 200, 200, 200]
    assert server.http.get("/health").json() == {"status": "ok"}
    server.call(worker.die)
    assert codes() == [200, 200, 503, 503]
    server.call(worker.be_ready)
    server.wait(lambda: server.app.state.intake.decoders.ready)
    assert codes() == [200, 200, 200, 200]
    server.call(lambda: worker.die(exhausted=True))
    assert codes() == [503, 200, 503, 503]


def test_info(server: Server) -> None:
    facts = server.http.get("/info").json()
    assert facts["model"] == {"name": "fake"}
    assert facts["limits"]["max_labels"] == 1000
    assert facts["defaults"]["method"] == "tapt"
    assert "JPEG" in facts["images"]["formats"]
    assert "api_keys" not in json.dumps(facts)


def test_openapi_describes_both_routes_in_full(server: Server) -> None:
    openapi = server.http.get("/openapi.json").json()
    text = json.dumps(openapi)
    assert "HTTPValidationError" not in text
    for reference in find(openapi, "$ref"):
        at: Any = openapi
        for key in reference.removeprefix("#/").split("/"):
            at = at[key]
    native = openapi["paths"]["/v1/classify"]["post"]
    assert native["requestBody"]["content"].keys() == {"application/json", "multipart/form-data"}
    form = native["requestBody"]["content"]["multipart/form-data"]["schema"]["properties"]
    assert form["image"] == {"type": "string", "format": "binary"}
    assert form.keys() >= DefenseOptions.model_fields.keys() | {"labels", "top_k"}
    hugging = openapi["paths"]["/"]["post"]
    assert "x-undefended-label" in hugging["responses"]["200"]["headers"]
    for operation in (native, hugging):
        codes = {"200", "400", "401", "408", "413", "415", "422", "429", "500", "503", "504"}
        assert operation["responses"].keys() == codes
        for code in codes - {"200"}:
            schema = operation["responses"][code]["content"]["application/json"]["schema"]
            assert schema == {"$ref": "#/components/schemas/ErrorBody"}
        assert "Retry-After" in operation["responses"]["429"]["headers"]
        assert operation["security"] == [{"HTTPBearer": []}]


def find(tree: Any, key: str) -> Iterator[str]:
    if isinstance(tree, dict):
        for name, value in tree.items():
            if name == key:
                yield value
            else:
                yield from find(value, key)
    elif isinstance(tree, list):
        for value in tree:
            yield from find(value, key)


@pytest.mark.parametrize("path", ["/docs", "/"])
def test_pages_load_nothing_from_elsewhere(server: Server, path: str) -> None:
    import re

    page = server.http.get(path)
    assert page.headers["content-type"].startswith("text/html")
    policy = page.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'")
    assert "script-src 'self';" in policy
    assert "http" not in re.sub(r"<!doctype.*?>", "", page.text)
    linked = re.findall(r'(?:src|href)="([^"#]+)"', page.text)
    assert linked
    for address in linked:
        if not address.startswith("data:"):
            assert server.http.get("/" + address).status_code == 200, address


def test_the_api_process_needs_no_torch() -> None:
    code = (
        "import sys, service.app, service.server, service.cli, service.commands.terminal;"
        "assert not {'torch', 'transformers'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# Metrics.

TYPES = {
    "tapt_requests": "counter",
    "tapt_request_seconds": "histogram",
    "tapt_slow_requests": "counter",
    "tapt_latency_objective_seconds": "gauge",
    "process_cpu_seconds": "counter",
    "process_open_fds": "gauge",
    "process_resident_memory_bytes": "gauge",
    "tapt_queue_seconds": "histogram",
    "tapt_queue_depth": "gauge",
    "tapt_queue_seconds_expected": "gauge",
    "tapt_decode_seconds": "histogram",
    "tapt_adaptation_seconds": "histogram",
    "tapt_batch_size": "histogram",
    "tapt_batch_views": "histogram",
    "tapt_adaptation_steps": "histogram",
    "tapt_entropy_before": "histogram",
    "tapt_entropy_after": "histogram",
    "tapt_view_agreement": "histogram",
    "tapt_suspected_adversarial": "counter",
    "tapt_label_changed": "counter",
    "tapt_truncated": "counter",
    "tapt_rejected": "counter",
    "tapt_key_file_errors": "counter",
    "tapt_key_file_ok": "gauge",
    "tapt_ready": "gauge",
    "tapt_worker_restarts": "counter",
    "tapt_worker_up": "gauge",
    "tapt_device_memory_bytes": "gauge",
    "tapt_text_cache_hits": "counter",
    "tapt_text_cache_misses": "counter",
    "tapt_build_info": "gauge",
}


def metrics_of(server: Server) -> str:
    from prometheus_client import generate_latest

    return generate_latest(server.app.state.metrics.registry).decode()


def test_metrics_have_their_names_and_types_and_no_text_of_a_user(
    start: START, photo: bytes
) -> None:
    info = {**READY.info, "versions": {"torch": "9.9"}}
    server = start(FakeWorker(ready=replace(READY, info=info)))
    labels = ["zebrafinch", "attacked"]
    server.http.post("/v1/classify", json=as_json(photo, candidate_labels=labels))
    server.http.post("/v1/classify", json=as_json(photo, candidate_labels=["zebrafinch"]))
    server.http.get("/zebrafinch", headers={"X-Request-Id": "zebrafinch"})
    answer = server.http.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    families = {family.name: family for family in text_string_to_metric_families(answer.text)}
    assert {name: family.type for name, family in families.items()}.items() >= TYPES.items()
    assert "zebrafinch" not in answer.text
    counts = {
        (sample.labels["route"], sample.labels["code"]): sample.value
        for sample in families["tapt_requests"].samples
        if sample.name == "tapt_requests_total"
    }
    assert counts == {("/v1/classify", "200"): 1, ("/v1/classify", "422"): 1, ("other", "404"): 1}
    rejected = [s for s in families["tapt_rejected"].samples if s.name == "tapt_rejected_total"]
    assert [(s.labels["reason"], s.value) for s in rejected] == [("unprocessable", 1)]
    (build,) = families["tapt_build_info"].samples
    assert build.labels == {"version": version("tapt-serve"), "torch": "9.9"}
    assert build.value == 1


def test_slow_answers_are_counted_against_the_objective(start: START, photo: bytes) -> None:
    for objective, slow in ((60_000, 0), (1, 1)):
        server = start(latency_objective_ms=objective)
        server.http.post("/v1/classify", json=as_json(photo, defense={"method": "plain"}))
        server.http.post("/v1/classify", json=as_json(photo, candidate_labels=[]))
        samples = {
            (sample.name, sample.labels.get("method")): sample.value
            for family in text_string_to_metric_families(server.http.get("/metrics").text)
            for sample in family.samples
        }
        times = {
            method: count
            for (name, method), count in samples.items()
            if name == "tapt_request_seconds_count"
        }
        assert times == {"plain": 1}  # a refusal is quick, and would hide slow answers
        assert samples["tapt_slow_requests_total", None] == slow
        assert samples["tapt_latency_objective_seconds", None] == objective / 1000


def test_the_time_of_an_answer_begins_when_the_request_is_complete(
    start: START, photo: bytes
) -> None:
    server, pause = start(), 1.0
    body = json.dumps(as_json(photo)).encode()

    def slowly() -> Iterator[bytes]:
        yield body[:1000]
        time.sleep(pause)
        yield body[1000:]

    headers = {"Content-Type": "application/json", "Content-Length": str(len(body))}
    began = time.monotonic()
    answered = server.http.post("/v1/classify", content=slowly(), headers=headers)
    took = time.monotonic() - began
    assert answered.status_code == 200
    value = server.app.state.metrics.registry.get_sample_value
    server.wait(lambda: value("tapt_request_seconds_count", {"method": "tapt"}) == 1)
    assert value("tapt_request_seconds_sum", {"method": "tapt"}) < took - pause / 2


def test_the_time_to_fetch_an_image_is_logged_and_is_no_part_of_the_answers(
    start: START, photo: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    class SlowHost:
        async def fetch(self, image: ImageURL, caller: str = "") -> bytes:
            await asyncio.sleep(1.0)
            if image.url.endswith("none"):
                raise Unprocessable("The image could not be fetched.")
            return photo

    caplog.set_level(logging.INFO, "tapt.request")

    def logged() -> list[dict[str, Any]]:
        return [record.fields for record in caplog.records]  # type: ignore[attr-defined]

    server = start(latency_objective_ms=900)
    server.app.state.intake.image_urls = SlowHost()
    body = {"candidate_labels": ["cat", "dog"], "image": "https://a.test/cat.jpg"}
    assert server.http.post("/v1/classify", json=body).status_code == 200
    body["image"] = "https://a.test/none"
    assert server.http.post("/v1/classify", json=body).status_code == 422
    assert server.http.post("/v1/classify", json=as_json(photo)).status_code == 200
    server.wait(lambda: len(logged()) == 3)
    first, refused, sent = logged()
    assert 900 < first["fetch_ms"] <= first["ms"]
    assert refused["fetch_ms"] > 900
    assert "fetch_ms" not in sent
    value = server.app.state.metrics.registry.get_sample_value
    assert value("tapt_request_seconds_count", {"method": "tapt"}) == 2
    assert value("tapt_request_seconds_sum", {"method": "tapt"}) < 0.9
    assert value("tapt_slow_requests_total") == 0


def test_buckets_reach_beyond_the_longest_request() -> None:
    assert max(SECONDS) > Settings().request_timeout_ms / 1000


def test_ready_is_what_the_probe_says(start: START) -> None:
    worker = FakeWorker(automatic=False)
    server = start(worker)

    def ready() -> tuple[bool, bool]:
        """By the probe, and by the metric."""
        probed = server.http.get("/readyz").is_success
        return probed, "\ntapt_ready 1.0\n" in server.http.get("/metrics").text

    server.wait(lambda: server.app.state.intake.decoders.ready)
    assert ready() == (False, False)
    server.call(worker.be_ready)
    server.wait(lambda: server.app.state.engine.ready)
    assert ready() == (True, True)
    server.call(server.app.state.intake.decoders._usable.clear)
    assert ready() == (False, False)


def test_log_lines_hold_no_text_of_a_user(
    start: START, photo: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    server = start(api_keys="sesame")
    with caplog.at_level("INFO", logger="tapt"):
        answer = server.http.post(
            "/v1/classify",
            json=as_json(photo, candidate_labels=["zebrafinch", "b"]),
            headers={"Authorization": "Bearer sesame"},
        )
        assert answer.is_success
        server.wait(lambda: "tapt.request" in [record.name for record in caplog.records])
    (record,) = [record for record in caplog.records if record.name == "tapt.request"]
    assert record.fields["labels"] == 2  # type: ignore[attr-defined]
    assert record.fields["status"] == 200  # type: ignore[attr-defined]
    assert "zebrafinch" not in str(record.__dict__)
    assert "sesame" not in str(record.__dict__)


def test_the_log_names_whose_answers_were_suspected(
    start: START, photo: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    def doubt(work: Task) -> Answer:
        return replaced(answer(work), suspected=work.labels[0] == "attacked")

    server = start(FakeWorker(doubt), api_keys="sesame", expose="label")

    def lines() -> list[dict[str, Any]]:
        return [record.fields for record in caplog.records if record.name == "tapt.request"]  # type: ignore[attr-defined]

    with caplog.at_level("INFO", logger="tapt"):
        for labels in (["attacked", "b"], ["a", "b"], ["a"]):
            server.http.post(
                "/v1/classify",
                json=as_json(photo, candidate_labels=labels),
                headers={"Authorization": "Bearer sesame"},
            )
        server.wait(lambda: len(lines()) == 3)
    assert [line.get("suspected") for line in lines()] == [True, False, None]
    listed = entry("sesame").removeprefix("sha256:")
    assert {line["key"] for line in lines()} == {listed[:8]}  # as the runbook says


def test_schemas_and_settings_know_the_same_words() -> None:
    for name in ("method", "readout"):
        offered = DefenseOptions.model_json_schema()["properties"][name]["anyOf"][0]["enum"]
        assert offered == Settings.model_json_schema()["properties"][name]["enum"]
