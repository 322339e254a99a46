"""Bodies made to hurt: text, JSON, forms and HTTP. Each gets a typed error or an answer, soon, and
the server goes on."""

import base64
import contextlib
import gzip
import io
import json
import re
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from PIL import Image

from tests.conftest import Server

pytestmark = pytest.mark.alone

START = Callable[..., Server]
MEGABYTE = 2**20
PATIENCE = 10.0  # seconds, on a busy machine; the worst takes about one


@pytest.fixture(scope="module")
def image(photo: bytes) -> str:
    return base64.b64encode(photo).decode()


def ask(server: Server, body: bytes | dict[str, Any], kind: str = "application/json") -> Any:
    """The answer, which is of the one shape where it is an error, and never a fault of ours."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    began = time.monotonic()
    answer = server.http.post("/v1/classify", content=content, headers={"Content-Type": kind})
    assert time.monotonic() - began < PATIENCE
    assert answer.status_code < 500, answer.text
    if not answer.is_success:
        assert answer.json().keys() == {"error", "error_type", "request_id"}
        assert len(answer.text) < 500  # nothing large comes back
    assert server.http.get("/livez").status_code == 200
    return answer


# Text.


@pytest.mark.parametrize(
    "labels",
    [
        ["cat", "d\0g"],
        ["cat", "d\x1b[2Jg"],
        ["cat", "\x85dog\x9f"],
        ["cat", "\u202egod"],
        ["cat", "\u2066dog\u2069"],
        ["cat", "\u200b"],
        ["cat", "\u2060\ufeff\u00ad"],
        ["cat", "\u3000\u00a0\t"],
        ["caf\u00e9", "cafe\u0301"],
        ["\u1e69", "s\u0323\u0307"],
        ["\uac00", "\u1100\u1161"],
    ],
    ids=lambda labels: ascii(labels[-1]),
)
def test_labels_that_are_not_what_they_look_like(
    server: Server, image: str, labels: list[str]
) -> None:
    answer = ask(server, {"image": image, "candidate_labels": labels})
    assert (answer.status_code, answer.json()["error_type"]) == (422, "unprocessable")
    form = {"files": {"image": b"x"}, "data": {"labels": labels}}
    assert server.http.post("/v1/classify", **form).status_code == 422  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "label",
    [
        "\u05db\u05dc\u05d1\u200f!",  # Hebrew with a right-to-left mark
        "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645",  # Persian with a non-joiner
        "\U0001f468\u200d\U0001f469\u200d\U0001f467",  # a family, joined
        "\U0001f1e9\U0001f1ea",
        "hot\tdog\nwith mustard",
        "'; DROP TABLE labels; --",
        "<script>alert(1)</script>",
        "../../etc/passwd",
        "%s%n{0}${x}",
        "<|endoftext|><|startoftext|>",
        "\U0010fffd",
        "e" + "\u0301" * 200,
    ],
    ids=ascii,
)
def test_odd_labels_come_back_as_they_are(server: Server, image: str, label: str) -> None:
    answer = ask(server, {"image": image, "candidate_labels": [label, "other"]})
    assert answer.status_code == 200
    assert answer.json()["labels"][0]["label"] == label
    assert answer.headers["content-type"] == "application/json"
    hugging = {"inputs": image, "parameters": {"candidate_labels": [label, "other"]}}
    headers = server.http.post("/", json=hugging).headers
    assert re.fullmatch(r"[!-~]+", headers["x-undefended-label"])


@pytest.mark.parametrize(
    "template",
    [
        "{}" * 5 * MEGABYTE,
        "{}" + "x" * 10 * MEGABYTE,
        "x" * 10 * MEGABYTE,
        "{0}", "{label}", "{!r}", "{:>9}", "{}{0}", "{0.__class__}", "{{}}", "{ }", "}{", "{}}",
        "{}\0", "\u202e{}",
    ],
    ids=lambda template: f"{template[:8]!a}-{len(template)}",
)  # fmt: skip
def test_templates(server: Server, image: str, template: str) -> None:
    body = {"image": image, "candidate_labels": ["a", "b"], "hypothesis_template": template}
    assert ask(server, body).status_code == 422


def test_format_fields_in_labels_are_only_text(server: Server, image: str) -> None:
    labels = ["{}", "{0.__class__}", "{{"]
    body = {"image": image, "candidate_labels": labels, "hypothesis_template": "a {}"}
    assert ask(server, body).status_code == 200
    assert server.worker.batches[-1][0].labels == tuple(labels)


def test_many_and_long_labels(server: Server, image: str) -> None:
    def status(labels: Any) -> int:
        answer = ask(server, {"image": image, "candidate_labels": labels})
        return int(answer.status_code)

    assert status([str(i) for i in range(1000)]) == 200
    assert status([str(i) for i in range(1001)]) == 422
    assert status([str(i) for i in range(200_000)]) == 422
    assert status(["same"] * 1000) == 422
    assert status("," * 10 * MEGABYTE) == 422
    assert status(["x" * 5 * MEGABYTE, "y" * 5 * MEGABYTE]) == 422
    assert status(["x" * 256, "y" * 256]) == 200


# JSON. In sound company: with a bad image each would be refused for that, whatever else it holds.


def picture() -> bytes:
    """A GIF, because a PNG begins with line ends, which one of the forms has changed."""
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "GIF")
    return buffer.getvalue()


PICTURE = picture()
HEAD = b'{"image": "%s", "candidate_labels": ["a", "b"]' % base64.b64encode(PICTURE)
JSON = {
    "wrong labels by the million": (422, b'{"candidate_labels": [' + b"1," * 7_000_000 + b"1]}"),
    "labels by the million": (422, b'{"candidate_labels": [' + b'"a",' * 3_000_000 + b'"b"]}'),
    "fields by the million": (422,
        b"{" + b",".join(b'"k%d":1' % i for i in range(1_000_000)) + b"}"),
    "fields to the limit": (422, b"{" + b",".join(b'"k%d":1' % i for i in range(50_000)) + b"}"),
    "arrays in arrays": (400, HEAD + b', "top_k": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "objects in objects": (400, b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
    "arrays beside arrays": (422, b"[" + b"[]," * 4_000_000 + b"[]]"),
    "a dash before": (400, b" \n-" + b"1," * 5_000_000),
    "a huge whole number": (400, HEAD + b', "top_k": ' + b"9" * 5_000_000 + b"}"),
    "a huge negative one": (422, HEAD + b', "defense": {"steps": -' + b"9" * 4000 + b"}}"),
    "a huge exponent": (422, HEAD + b', "defense": {"deadline_ms": 1e999999999}}'),
    "a tiny exponent": (422, HEAD + b', "defense": {"deadline_ms": 1e-999999999}}'),
    "NaN": (422, HEAD + b', "defense": {"deadline_ms": NaN}}'),
    "-Infinity": (422, HEAD + b', "defense": {"deadline_ms": -Infinity}}'),
    "a string": (422, b'"image"'),
    "null": (422, b"null"),
    "an array": (422, b"[]"),
    "UTF-16": (400, (HEAD + b"}").decode().encode("utf-16")),
    "a comment": (400, HEAD + b"/* */}"),
    "two values": (400, HEAD + b"}" + HEAD + b"}"),
    "a trailing comma": (400, HEAD + b",}"),
    "single quotes": (400, b"{'image': 'a'}"),
    "a NUL": (400, HEAD + b"}\0"),
    "a lone surrogate in a label": (400, HEAD.replace(b'"b"', b'"\\udfff"') + b"}"),
}  # fmt: skip


@pytest.mark.parametrize(("status", "body"), JSON.values(), ids=JSON)
def test_hostile_json_is_refused(server: Server, status: int, body: bytes) -> None:
    assert ask(server, body).status_code == status
    answer = server.http.post("/", content=body)
    # Hugging Face's protocol has no defense, and what it has not is overlooked there.
    assert answer.status_code == (200 if b'"defense"' in body else status), answer.text


def test_json_without_what_is_hostile_is_answered(server: Server) -> None:
    """Or the refusals above would prove nothing."""
    assert ask(server, HEAD + b"}").status_code == 200
    assert server.http.post("/", content=HEAD + b"}").status_code == 200
    huge = HEAD + b', "top_k": ' + b"9" * 4000 + b"}"  # as many labels as there are
    assert ask(server, huge).status_code == 200


def test_of_a_field_given_twice_the_last_counts(server: Server, image: str) -> None:
    """As in Python and JavaScript; one reader means one meaning."""
    fields = f'"image": "{image}", "candidate_labels": ["a", "b"], "candidate_labels": ["c", "d"]'
    answer = ask(server, f'{{"top_k": -1, {fields}, "top_k": 1}}'.encode())
    assert [scored["label"] for scored in answer.json()["labels"]] == ["c"]


@pytest.mark.parametrize("field", ["image", "candidate_labels", "top_k", "hypothesis_template"])
@pytest.mark.parametrize("value", [{}, [[]], True, -1, 0.5, "", {"$ne": 1}, [None], [["a"], ["b"]]])
def test_wrong_types(server: Server, image: str, field: str, value: Any) -> None:
    body = {"image": image, "candidate_labels": ["a", "b"], field: value}
    assert ask(server, body).status_code in {400, 422}


# Forms.

FORM = "multipart/form-data; boundary=x"
FILE = b'--x\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n%s\r\n'
FILE %= PICTURE
LABELS = b'--x\r\nContent-Disposition: form-data; name="labels"\r\n\r\n%s\r\n'
END = b"--x--\r\n"
SOUND = FILE + LABELS % b"a,b"
FORMS = {
    "commas by the million": (422, FILE + LABELS % (b"a," * 5_000_000) + END),
    "JSON labels by the million": (422, FILE + LABELS % (b"[" + b"1," * 5_000_000 + b"1]") + END),
    "deep labels": (400, FILE + LABELS % (b"[" * MEGABYTE) + END),
    "parts by the hundred thousand": (422, FILE + LABELS % b"a" * 100_000 + END),
    "a long header": (400, b"--x\r\nA: " + b"b" * 10 * MEGABYTE + b"\r\n\r\n\r\n" + END),
    "many headers": (400, b"--x\r\n" + b"A: b\r\n" * MEGABYTE + b"\r\n\r\n" + END),
    "a header without end": (400, b"--x\r\nContent-Disposition: form-data; name=" + b'"' * 10_000),
    "parameters by the million": (400,
        b"--x\r\nContent-Disposition: form-data" + b"; a=b" * 2_000_000 + b"\r\n\r\n\r\n" + END),
    "almost the boundary": (422, FILE + LABELS % (b"\r\n--y" * 2_000_000) + END),
    "no name": (422, SOUND + b"--x\r\nContent-Disposition: form-data\r\n\r\nabc\r\n" + END),
    "no disposition": (422, SOUND + b"--x\r\n\r\nabc\r\n" + END),
    "a name that is no UTF-8": (422, SOUND + FILE.replace(b'"image"', b'"\xff"') + END),
    "two images": (422, FILE + SOUND + END),
    "bare newlines": (400, (SOUND + END).replace(b"\r\n", b"\n")),
    "nothing": (400, b""),
    "an end only": (422, END),
    "JSON": (400, b"{}"),
}  # fmt: skip


@pytest.mark.parametrize(("status", "body"), FORMS.values(), ids=FORMS)
def test_hostile_forms_are_refused(server: Server, status: int, body: bytes) -> None:
    assert ask(server, body, FORM).status_code == status


def test_a_form_without_what_is_hostile_is_answered(server: Server) -> None:
    assert ask(server, SOUND + END, FORM).status_code == 200


@pytest.mark.parametrize(
    "kind",
    [
        "multipart/form-data",
        "multipart/form-data; boundary=",
        "multipart/form-data; boundary=" + "y" * 10_000,
        "multipart/form-data; boundary=\"x",
        "multipart/form-data; charset=x",
        "multipart/form-data; boundary*=utf-8''%ff",
        "multipart/mixed; boundary=x",
        "application/x-www-form-urlencoded",
        "application/xml",
        "text/plain",
        "image/png",
        "application/json; charset=utf-16",
        "é",
        "",
    ],
)  # fmt: skip
def test_content_types_that_do_not_fit(server: Server, kind: str) -> None:
    assert ask(server, SOUND + END, kind.encode("latin-1")).status_code == 400  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["cat.png", "cat.jpg;.svg", "../../cat.svg", "c\\u202egpj.exe"])
def test_a_file_is_what_it_holds_and_not_its_name(server: Server, photo: bytes, name: str) -> None:
    svg = b"<svg xmlns='http://www.w3.org/2000/svg'/>"
    for content, status in ((svg, 415), (b"%PDF-1.7", 415), (photo, 200)):
        for kind in ("image/png", "image/svg+xml", "application/pdf"):
            parts = {"files": {"image": (name, content, kind)}, "data": {"labels": "a,b"}}
            answer = server.http.post("/v1/classify", **parts)  # type: ignore[arg-type]
            assert answer.status_code == status, answer.text


# HTTP.


def test_a_compressed_body_is_unpacked_up_to_the_limit(start: START) -> None:
    server = start(max_body_bytes=MEGABYTE)
    headers = {"Content-Encoding": "gzip", "Content-Type": "application/json"}

    def send(size: int) -> httpx.Response:
        body = gzip.compress(b" " * (size - len(HEAD) - 1) + HEAD + b"}")
        assert len(body) < MEGABYTE / 4
        return server.http.post("/v1/classify", content=body, headers=headers)

    assert send(MEGABYTE).status_code == 200
    refused = send(MEGABYTE + 1)
    assert refused.status_code == 413
    assert refused.json()["error"] == f"The decompressed body is larger than {MEGABYTE} bytes."


def test_a_compression_bomb_ends_at_the_limit_and_lets_others_through(server: Server) -> None:
    bomb = gzip.compress(bytes(2**30))
    headers = {"Content-Encoding": "gzip", "Content-Type": "application/json"}
    with ThreadPoolExecutor(1) as pool:
        sent = pool.submit(server.http.post, "/v1/classify", content=bomb, headers=headers)
        while not sent.done():
            began = time.monotonic()
            assert httpx.get(f"{server.url}/livez").status_code == 200
            assert time.monotonic() < began + 1
    assert sent.result().status_code == 413
    server.wait(lambda: not server.app.state.intake.uploads.bytes)


def test_gzip_without_output_is_bounded_by_its_own_size(start: START) -> None:
    """Empty blocks take time to read and give nothing."""
    server = start(max_body_bytes=MEGABYTE)
    headers = {"Content-Encoding": "gzip"}
    empty = gzip.compress(b"")[:10] + b"\0\0\0\xff\xff" * (MEGABYTE // 5 + 1)
    chunks = (empty[i : i + 2**16] for i in range(0, len(empty), 2**16))
    answer = server.http.post("/v1/classify", content=chunks, headers=headers)
    assert answer.status_code == 413, answer.text


@pytest.mark.parametrize(
    "head",
    [
        b"POST /v1/classify HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        b"POST /v1/classify HTTP/1.1\r\nHost: x\r\nContent-Length: 9" + b"9" * 30 + b"\r\n\r\n",
        b"POST /v1/classify HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        b"POST /v1/classify HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n",
        b"POST /v1/classify HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip\r\n\r\n",
        b"POST /v1/classify HTTP/1.1\r\nContent-Length: 0\r\n\r\n",
        b"POST /v1/classify HTTP/1.1\r\nHost: x\r\nA: " + b"b" * 100_000 + b"\r\n\r\n",
        b"POST /v1/classify HTTP/1.1\r\nHost: x\r\nA\0: b\r\n\r\n",
        b"POST /v1/classify HTTP/9.9\r\nHost: x\r\n\r\n",
        b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET http://169.254.169.254/ HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
        b"GET /%2e%2e/%2e%2e/etc/passwd HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
        b"GET /livez%00 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
        b"CONNECT x:1 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
        b"TRACE / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
    ],
    ids=lambda head: ascii(head[:60].decode("latin-1")),
)
def test_hostile_http_is_refused(server: Server, head: bytes) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE) as client:
        client.sendall(head)
        status = client.recv(65536).split()[1]
    assert status[:1] == b"4", status
    assert server.http.get("/livez").status_code == 200


INNER = b"GET /livez HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
HIDDEN = b"0\r\n\r\n" + INNER
LENGTH = b"Content-Length: %d\r\n" % len(HIDDEN)
CHUNKED = b"Transfer-Encoding: chunked\r\n"
SMUGGLED = {
    "behind the last chunk": (b"POST / HTTP/1.1", LENGTH + CHUNKED, HIDDEN),
    "in the other order": (b"POST / HTTP/1.1", CHUNKED + LENGTH, HIDDEN),
    "in a chunk": (
        b"POST / HTTP/1.1", b"Content-Length: 4\r\n" + CHUNKED,
        b"%x\r\n%s\r\n" % (len(INNER), INNER) + HIDDEN),
    "where no body belongs": (b"GET /livez HTTP/1.1", LENGTH + CHUNKED, HIDDEN),
    "an encoding that is none": (
        b"POST / HTTP/1.1", LENGTH + CHUNKED.replace(b"chunked", b"xchunked"), HIDDEN),
    "a blank before the colon": (
        b"POST / HTTP/1.1", LENGTH + CHUNKED.replace(b":", b" :"), HIDDEN),
    "an old version": (b"POST / HTTP/1.0", LENGTH + CHUNKED, HIDDEN),
}  # fmt: skip


@pytest.mark.parametrize(("line", "headers", "rest"), SMUGGLED.values(), ids=SMUGGLED)
def test_a_request_smuggled_between_two_lengths_is_not_answered(
    server: Server, line: bytes, headers: bytes, rest: bytes
) -> None:
    """Where a proxy and the server differ on where a body ends, the one behind it is somebody
    else's. So a request with both lengths is the last on its connection."""
    received = b""
    with socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE) as client:
        client.sendall(line + b"\r\nHost: x\r\n" + headers + b"\r\n" + rest)
        with contextlib.suppress(ConnectionResetError):
            while data := client.recv(65536):
                received += data
    assert re.findall(rb"HTTP/1.1 (\d)", received) in ([], [b"4"]), received
    assert server.http.get("/livez").status_code == 200


def test_a_body_chunked_byte_by_byte(server: Server, image: str) -> None:
    def chunks() -> Iterator[bytes]:
        body = json.dumps({"image": image, "candidate_labels": ["a", "b"]}).encode()
        yield from (body[at : at + 1] for at in range(20_000))
        yield body[20_000:]

    assert server.http.post("/v1/classify", content=chunks()).status_code == 200


def test_headers_of_a_client_are_not_echoed_unchecked(server: Server) -> None:
    for given in ("a\tb", "x" * 5000, "é"):
        headers = {b"X-Request-Id": given.encode("latin-1")}
        echoed = server.http.get("/livez", headers=headers).headers["x-request-id"]
        assert re.fullmatch(r"[0-9a-f]{32}", echoed)


def test_the_hugging_face_route_is_as_careful(server: Server, image: str) -> None:
    def post(**body: Any) -> httpx.Response:
        return server.http.post("/", json=body)

    for labels in (["a", "\u202eb"], ["caf\u00e9", "cafe\u0301"], "a", ["a"] * 5, {"a": "b"}, 1):
        assert post(inputs=image, parameters={"candidate_labels": labels}).status_code == 422
    for inputs in ({"image": {"image": image}}, [image], 5, {}, {"text": "x"}):
        assert post(inputs=inputs, parameters={"candidate_labels": ["a", "b"]}).status_code == 422
    wrong: list[object] = [[], "x", 1]
    for parameters in wrong:
        assert post(inputs=image, parameters=parameters).status_code == 422
