"""The time a body costs grows at most linearly with its size, whatever it holds and wherever it is
sent. Decoding images is left out: that has a limit of its own."""

import base64
import contextlib
import http.client
import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.conftest import Server
from tests.fake_worker import FakeWorker

SIZES = [2**16, 2**18, 2**20]  # bytes
GROWTH = 8  # at most, where the size grows by 4; it would be 16 were it quadratic
NOISE = 0.15  # seconds

NO_IMAGE = base64.b64encode(b"hello").decode()
FORM = "multipart/form-data; boundary=x"
END = b"--x--\r\n"


def marks(size: int) -> str:
    """A letter and combining marks of two classes, in the order that takes longest to sort."""
    return "a" + "\u0301" * (size // 4) + "\u0316" * (size // 4)


def in_turn(size: int) -> str:
    return "a" + "\u0301\u0316" * (size // 4)


TEXTS: dict[str, Callable[[int], str]] = {
    "combining marks": marks,
    "combining marks in turn": in_turn,
    "Hangul": lambda size: "\u1100\u1161\u11a8" * (size // 9),
    "blanks": lambda size: " " * size,
    "blanks inside": lambda size: "x" + " " * size + "x",
    "commas": lambda size: "," * size,
    "braces": lambda size: "{}" * (size // 2),
    "opening braces": lambda size: "{" * size,
    "brackets": lambda size: "[" * size,
    "digits": lambda size: "9" * size,
    "line ends": lambda size: "\r\n" * (size // 2),
    "quotes": lambda size: '"' * size,
    "backslashes": lambda size: "\\" * size,
    "surrogate pairs": lambda size: "\U0001f600" * (size // 4),
    "control characters": lambda size: "\u202e" * (size // 3),
    "dashes": lambda size: "-" * size,
    "almost the boundary": lambda size: "\r\n--y" * (size // 5),
    "equals signs": lambda size: "=" * size,
    "data URI": lambda size: "data:" + ";" * size,
    "URL": lambda size: "https://" + "a" * size,
}
FIELDS: dict[str, Callable[[str], dict[str, Any]]] = {
    "image": lambda text: {"image": text},
    "label": lambda text: {"candidate_labels": ["a", text]},
    "labels in one text": lambda text: {"candidate_labels": "b," + text},
    "many labels": lambda text: {
        "candidate_labels": [f"{at} {text[at : at + 200]}" for at in range(0, len(text), 200)]
    },
    "template": lambda text: {"hypothesis_template": "{}" + text},
    "method": lambda text: {"defense": {"method": text}},
    "target": lambda text: {"attack": {"epsilon": 1, "steps": 1, "target": text}},
    "unknown field": lambda text: {text: 1},
    "unknown field of the defense": lambda text: {"defense": {text: 1}},
}
ROUTES = ["/v1/classify", "/", "/demo/classify", "/demo/attack"]


def as_json(fields: dict[str, Any]) -> bytes:
    body = {"image": NO_IMAGE, "candidate_labels": ["a", "b"]} | fields
    return json.dumps(body, ensure_ascii=False).encode()


JSON: dict[str, Callable[[int], bytes]] = {
    "a whole number": lambda size: b'{"top_k": ' + b"9" * size + b"}",
    "whole numbers": lambda size: b'{"k": [' + (b"9" * 4000 + b",") * (size // 4001) + b"1]}",
    "a fraction": lambda size: b'{"defense": {"deadline_ms": 0.' + b"9" * size + b"}}",
    "an exponent": lambda size: b'{"defense": {"deadline_ms": 1e' + b"9" * size + b"}}",
    "arrays in arrays": lambda size: b"[" * size,
    "objects in objects": lambda size: b'{"a":' * (size // 5),
    "arrays beside arrays": lambda size: b"[" + b"[]," * (size // 3) + b"[]]",
    "fields": lambda size: b"{" + b",".join(b'"k%d":1' % i for i in range(size // 12)) + b"}",
    "a field again": lambda size: b"{" + b'"image":"a",' * (size // 12) + b'"image":"b"}',
    "wrong labels": lambda size: b'{"candidate_labels":[' + b"1," * (size // 2) + b"1]}",
    "escapes": lambda size: b'{"image":"' + b"\\u0041" * (size // 6) + b'"}',
    "pairs of escapes": lambda size: b'{"image":"' + b"\\ud83d\\ude00" * (size // 12) + b'"}',
    "blanks": lambda size: b" " * size + b"{}",
}


def part(name: bytes, value: bytes) -> bytes:
    return b'--x\r\nContent-Disposition: form-data; name="%s"\r\n\r\n%s\r\n' % (name, value)


def form(name: str) -> Callable[[str], bytes]:
    def fill(text: str) -> bytes:
        company = part(b"image", b"hello") + (b"" if name == "labels" else part(b"labels", b"a,b"))
        return company + part(name.encode(), text.encode()) + END

    return fill


IN_FORM = {name: form(name) for name in ("labels", "defense", "hypothesis_template", "steps")}
DISPOSITION = b"--x\r\nContent-Disposition: form-data"
FORMS: dict[str, Callable[[int], bytes]] = {
    "preamble": lambda size: b"\r\n" * (size // 2) + part(b"image", b"hello") + END,
    "epilogue": lambda size: part(b"image", b"hello") + END + b"\r\n" * (size // 2),
    "headers": lambda size: b"--x\r\n" + b"A: b\r\n" * (size // 6) + b"\r\n\r\n" + END,
    "a header": lambda size: b"--x\r\nA: " + b"b" * size + b"\r\n\r\n" + END,
    "parameters": lambda size: DISPOSITION + b"; a=b" * (size // 5) + b"\r\n\r\n" + END,
    "semicolons": lambda size: DISPOSITION + b";" * size + b"\r\n\r\n" + END,
    "quotes": lambda size: DISPOSITION + b'; name="' + b'\\"' * (size // 2) + b'"\r\n\r\n' + END,
    "parts": lambda size: part(b"labels", b"a") * (size // 60) + END,
    "empty parts": lambda size: b"--x\r\n\r\n\r\n" * (size // 9) + END,
}


@pytest.fixture(scope="module")
def open_server() -> Iterator[Server]:
    server = Server(FakeWorker(), enable_attack_demo=True)
    yield server
    server.stop()


def assert_linear(prepare: Callable[[int], Callable[[], None]], sizes: list[int]) -> None:
    """Send ever larger requests, until one costs more than its size accounts for.

    `prepare` makes the request of a size, and returns what sends it and checks the status.
    """

    def measure() -> float:
        began = time.process_time()  # server and client are in one process, and nothing else runs
        send()
        return time.process_time() - began

    before = float("inf")
    for size in sizes:
        send = prepare(size)
        bound = GROWTH * before + NOISE
        seconds = measure()
        for _ in range(2):  # again, in case of a garbage collection
            seconds = min(seconds, measure()) if seconds >= bound else seconds
        assert seconds < bound, f"{size} bytes take {seconds:.2f} s"
        before = seconds


def assert_linear_bodies(
    server: Server, path: str, body: Callable[[int], bytes], kind: str
) -> None:
    def prepare(size: int) -> Callable[[], None]:
        content = body(size)

        def send() -> None:
            answer = server.http.post(path, content=content, headers={"Content-Type": kind})
            assert 400 <= answer.status_code < 500, answer.text

        return send

    assert_linear(prepare, SIZES)


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize("field", FIELDS)
def test_text_in_a_field(open_server: Server, path: str, field: str) -> None:
    for text in TEXTS.values():
        assert_linear_bodies(
            open_server,
            path,
            lambda size, text=text: as_json(FIELDS[field](text(size))),  # type: ignore[misc]
            "application/json",
        )


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize("shape", JSON)
def test_shapes_of_json(open_server: Server, path: str, shape: str) -> None:
    assert_linear_bodies(open_server, path, JSON[shape], "application/json")


@pytest.mark.parametrize("name", IN_FORM)
@pytest.mark.parametrize("text", TEXTS)
def test_text_in_a_form(open_server: Server, name: str, text: str) -> None:
    assert_linear_bodies(
        open_server, "/v1/classify", lambda size: IN_FORM[name](TEXTS[text](size)), FORM
    )


@pytest.mark.parametrize("shape", FORMS)
def test_shapes_of_forms(open_server: Server, shape: str) -> None:
    assert_linear_bodies(open_server, "/v1/classify", FORMS[shape], FORM)


HEADERS: dict[str, Callable[[int], dict[str, str]]] = {
    "many": lambda size: {f"x-{i}": "" for i in range(size // 10)},
    "Authorization": lambda size: {"Authorization": "Bearer " + "x" * size},
    "Accept": lambda size: {"Accept": "text/plain;q=0.1," * (size // 17)},
    "X-Request-Id": lambda size: {"X-Request-Id": "x" * size},
    "boundaries": lambda size: {"Content-Type": FORM + ";" * size},
    "parameters": lambda size: {"Content-Type": FORM + ";a=b" * (size // 4)},
    "continuations": lambda size: {
        "Content-Type": FORM + "".join(f";a*{i}=b" for i in range(size // 8))
    },
}


@pytest.mark.parametrize("header", HEADERS)
@pytest.mark.parametrize(("method", "path"), [("POST", "/v1/classify"), ("GET", "/metrics")])
def test_headers(open_server: Server, method: str, path: str, header: str) -> None:
    """Heads are short, so that nothing in them can cost much; a longer one is refused."""

    def ask(size: int) -> int:
        # Not by httpx, which itself takes long to send many headers.
        connection = http.client.HTTPConnection("127.0.0.1", open_server.port, timeout=20)
        with contextlib.closing(connection):
            body = part(b"image", b"hello") + END
            connection.request(method, path, body, HEADERS[header](size))
            return connection.getresponse().status

    def prepare(size: int) -> Callable[[], None]:
        def send() -> None:
            assert ask(size) in {200, 400, 422}

        return send

    assert_linear(prepare, [2**10, 2**12, 15_000])
    try:
        status = ask(2**15)
    except OSError:
        return
    assert status == 400


def test_the_text_itself_is_fine(open_server: Server) -> None:
    """Or the refusals above would prove nothing of what comes behind the lengths."""
    fields = {"candidate_labels": [marks(500), in_turn(300)], "hypothesis_template": "a {}"}
    answer = open_server.http.post("/v1/classify", content=as_json(fields))
    assert answer.status_code == 415  # the image is none
