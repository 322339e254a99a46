"""What real clients, probes and proxies send beside the documented request."""

import base64
import gzip
import json
import logging
import socket
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from service.server import listen
from tests.conftest import Server

START = Callable[..., Server]
LABELS = ["cat", "dog, asleep"]
JSON = {"Content-Type": "application/json"}


def native(photo: bytes, **fields: Any) -> dict[str, Any]:
    return {"image": base64.b64encode(photo).decode(), "candidate_labels": LABELS} | fields


def hugging_face(photo: bytes, **parameters: Any) -> dict[str, Any]:
    image = base64.b64encode(photo).decode()
    return {"inputs": image, "parameters": {"candidate_labels": LABELS} | parameters}


def sentence(answer: httpx.Response, status: int) -> str:
    assert answer.status_code == status, answer.text
    text: str = answer.json()["error"]
    return text


def labels_of(answer: httpx.Response) -> set[str]:
    assert answer.status_code == 200, answer.text
    body = answer.json()
    return {scored["label"] for scored in (body if isinstance(body, list) else body["labels"])}


# Probes.


@pytest.mark.parametrize("path", ["/livez", "/readyz", "/startupz", "/health", "/metrics", "/"])
def test_head_answers_like_get_without_a_body(server: Server, path: str) -> None:
    server.wait(lambda: server.app.state.intake.decoders.ready)
    head, get = server.http.head(path), server.http.get(path)
    assert head.status_code == get.status_code == 200
    assert head.content == b""
    assert head.headers["content-type"] == get.headers["content-type"]


def test_head_of_a_server_that_is_not_ready(start: START) -> None:
    from tests.fake_worker import FakeWorker

    server = start(FakeWorker(automatic=False))
    assert server.http.head("/readyz").status_code == 503
    assert server.http.head("/livez").status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("PUT", "/", "GET, HEAD, POST"),
        ("OPTIONS", "/", "GET, HEAD, POST"),
        ("DELETE", "/readyz", "GET, HEAD"),
        ("GET", "/v1/classify", "POST"),
    ],
)
def test_a_wrong_method_is_told_all_that_would_do(
    server: Server, method: str, path: str, allowed: str
) -> None:
    answer = server.http.request(method, path)
    assert answer.status_code == 405
    assert answer.headers["allow"] == allowed


def test_a_form_at_the_hugging_face_route_is_sent_to_the_other(
    server: Server, photo: bytes
) -> None:
    answer = server.http.post("/", files={"image": photo}, data={"labels": "cat,dog"})
    assert sentence(answer, 400) == "This route takes JSON; send forms to `/v1/classify`."


def test_head_is_not_described(server: Server) -> None:
    paths = server.http.get("/openapi.json").json()["paths"]
    assert not [path for path, methods in paths.items() if "head" in methods]


# Bodies.


@pytest.mark.parametrize(("path", "body"), [("/v1/classify", native), ("/", hugging_face)])
@pytest.mark.parametrize("encoding", ["gzip", "GZip", "x-gzip"])
def test_a_byte_order_mark_and_gzip_are_read(
    server: Server, photo: bytes, path: str, body: Callable[[bytes], Any], encoding: str
) -> None:
    text = b"\xef\xbb\xbf" + json.dumps(body(photo)).encode()
    assert labels_of(server.http.post(path, content=text, headers=JSON)) == set(LABELS)
    headers = JSON | {"Content-Encoding": encoding}
    packed = server.http.post(path, content=gzip.compress(text), headers=headers)
    assert labels_of(packed) == set(LABELS)


def test_a_gzip_form_in_small_chunks_is_read(server: Server, photo: bytes) -> None:
    form = httpx.Request("POST", server.url, files={"image": photo}, data={"labels": "cat,dog"})
    packed = gzip.compress(form.read())
    headers = {"Content-Type": form.headers["content-type"], "Content-Encoding": "gzip"}
    chunks = (packed[i : i + 100] for i in range(0, len(packed), 100))
    assert labels_of(server.http.post("/v1/classify", content=chunks, headers=headers)) == {
        "cat",
        "dog",
    }


def test_output_that_fills_a_piece_exactly_is_complete(server: Server, photo: bytes) -> None:
    from service.intake.content_encoding import PIECE

    text = json.dumps(native(photo)).encode()
    text = text.ljust(-(-len(text) // PIECE) * PIECE)
    headers = JSON | {"Content-Encoding": "gzip"}
    answer = server.http.post("/v1/classify", content=gzip.compress(text), headers=headers)
    assert labels_of(answer) == set(LABELS)


@pytest.mark.parametrize(
    ("encoding", "change", "status", "named"),
    [
        ("br", lambda body: body, 415, "Content-Encoding"),
        ("gzip, gzip", lambda body: body, 415, "Content-Encoding"),
        ("gzip", lambda body: b"plain", 400, "not valid gzip"),
        ("gzip", lambda body: body[:-9], 400, "truncated"),
        ("gzip", lambda body: body[:-8] + bytes(8), 400, "not valid gzip"),
        ("gzip", lambda body: body + body, 400, "after its end"),
    ],
)
def test_other_encodings_and_damaged_gzip_are_refused_by_name(
    server: Server,
    photo: bytes,
    encoding: str,
    change: Callable[[bytes], bytes],
    status: int,
    named: str,
) -> None:
    body = change(gzip.compress(json.dumps(native(photo)).encode()))
    headers = JSON | {"Content-Encoding": encoding}
    answer = server.http.post("/v1/classify", content=body, headers=headers)
    assert named in sentence(answer, status)


def test_identity_is_no_encoding(server: Server, photo: bytes) -> None:
    headers = {"Content-Encoding": "identity"}
    answer = server.http.post("/v1/classify", json=native(photo), headers=headers)
    assert labels_of(answer) == set(LABELS)


@pytest.mark.parametrize("content_type", ["multipart/form-data", "multipart/form-data; charset=x"])
def test_a_form_without_its_boundary_is_told_so(server: Server, content_type: str) -> None:
    answer = server.http.post(
        "/v1/classify", content=b"--x\r\n\r\n", headers={"Content-Type": content_type}
    )
    assert "has no boundary" in sentence(answer, 400)


def test_a_form_with_another_content_type_is_told_so(server: Server) -> None:
    answer = server.http.post("/v1/classify", content=b"------x\r\n\r\n", headers=JSON)
    assert "its Content-Type is not `multipart/form-data; boundary=...`" in sentence(answer, 400)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-be"])
def test_another_encoding_is_told_so(server: Server, photo: bytes, encoding: str) -> None:
    text = json.dumps(native(photo)).encode(encoding)
    answer = server.http.post("/v1/classify", content=text, headers=JSON)
    assert sentence(answer, 400) == "The body is UTF-16 or UTF-32; send UTF-8."


def test_broken_json_is_told_so(server: Server) -> None:
    answer = server.http.post("/v1/classify", content=b'{"image": 1,}', headers=JSON)
    assert "not valid JSON: trailing comma at line 1 column 13" in sentence(answer, 400)


@pytest.mark.parametrize("half", ["\\ud83d", "\\ud83dx", "\\ude00", "\\ud83d\\u0041"])
@pytest.mark.parametrize("path", ["/v1/classify", "/"])
def test_half_of_a_surrogate_pair_is_named(
    server: Server, photo: bytes, path: str, half: str
) -> None:
    for field in ('["%s", "dog"]', '"[\\"%s\\", \\"dog\\"]"'):
        inside = field.startswith('"')
        text = json.dumps(native(photo, candidate_labels=0))
        escaped = half.replace("\\", "\\\\") if inside else half
        labels = field % escaped
        text = text.replace('"candidate_labels": 0', f'"candidate_labels": {labels}')
        answer = server.http.post(path, content=text, headers=JSON)
        assert "half of a surrogate pair at line 1 column" in sentence(answer, 400)


def test_a_form_names_half_of_a_surrogate_pair(server: Server, photo: bytes) -> None:
    data = {"labels": '["\\ud83d", "dog"]'}
    answer = server.http.post("/v1/classify", files={"image": photo}, data=data)
    assert "half of a surrogate pair" in sentence(answer, 400)


# Labels.


@pytest.mark.parametrize("text", ['["cat", "dog, asleep"]', ' [ "cat","dog, asleep" ] '])
def test_a_json_list_in_a_string_is_a_list_on_every_route(
    start: START, photo: bytes, text: str
) -> None:
    server = start(enable_attack_demo=True)
    body = native(photo, candidate_labels=text)
    image = {"inputs": body["image"], "candidate_labels": text}
    answers = [
        server.http.post("/v1/classify", json=body),
        server.http.post("/v1/classify", files={"image": photo}, data={"labels": text}),
        server.http.post("/", json=hugging_face(photo, candidate_labels=text)),
        server.http.post("/", json=image),
        server.http.post("/demo/classify", json=body),
    ]
    assert [labels_of(answer) for answer in answers] == [set(LABELS)] * len(answers)


def test_a_list_in_a_string_has_the_limits_of_a_list(start: START, photo: bytes) -> None:
    server = start(max_labels=3)
    for text, status, named in (
        (json.dumps(["a, b, c, d", "e, f"]), 200, ""),  # commas inside labels do not count
        (json.dumps(["a", "b", "c", "d"]), 422, "There are 4 labels; the limit is 3"),
        (json.dumps(["a" * 257, "b"]), 422, "longer than 256"),
        ("[cat], [dog]", 400, "`candidate_labels` is not valid JSON"),
        ("[" * 1000, 400, "not valid JSON"),
    ):
        answer = server.http.post("/v1/classify", json=native(photo, candidate_labels=text))
        if named:
            assert named in sentence(answer, status)
        else:
            assert answer.status_code == status, answer.text


def test_multi_label_is_refused(server: Server, photo: bytes) -> None:
    answer = server.http.post("/", json=hugging_face(photo, multi_label=True))
    assert "labels cannot be scored independently" in sentence(answer, 422)
    assert "`parameters.multi_label`" in answer.json()["error"]
    flat = {"image": native(photo)["image"], "candidate_labels": LABELS, "multi_label": True}
    assert "multi_label" in sentence(server.http.post("/", json=flat), 422)
    for value in (False, None):  # as they are
        answer = server.http.post("/", json=hugging_face(photo, multi_label=value))
        assert labels_of(answer) == set(LABELS)


@pytest.mark.parametrize("path", ["/v1/classify", "/", "/demo/classify"])
def test_query_parameters_are_refused(start: START, photo: bytes, path: str) -> None:
    server = start(enable_attack_demo=True)
    body = hugging_face(photo) if path == "/" else native(photo)
    answer = server.http.post(path, json=body, params={"top_k": "1"})
    assert sentence(answer, 422) == (
        "The query parameter `top_k` is unknown; options belong in the body."
    )
    assert server.http.post(f"{path}?", json=body).status_code == 200
    assert server.http.get("/readyz", params={"verbose": ""}).status_code == 200


# Addresses and headers.


def test_a_prefix_is_understood_stripped_or_not(
    start: START, photo: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    server = start(root_path="/clip")
    with caplog.at_level("INFO", logger="tapt.request"):
        for prefix in ("", "/clip"):
            answer = server.http.post(f"{prefix}/v1/classify", json=native(photo))
            assert labels_of(answer) == set(LABELS)  # so the server is ready
            assert server.http.get(f"{prefix}/readyz").status_code == 200
            described = server.http.get(f"{prefix}/openapi.json").json()
            assert described["servers"] == [{"url": "/clip"}]
            for page in (f"{prefix}/", f"{prefix}/docs", f"{prefix}/playground/page.js"):
                assert server.http.get(page).status_code == 200
    routes = [record.fields["route"] for record in caplog.records]  # type: ignore[attr-defined]
    assert routes.count("/v1/classify") == 2
    assert "/readyz" not in routes  # probes are not logged


def test_without_a_prefix_no_server_is_named(server: Server) -> None:
    assert "servers" not in server.http.get("/openapi.json").json()
    assert server.http.get("/clip/readyz").status_code == 404


def test_listed_origins_may_call_from_a_browser(start: START, photo: bytes) -> None:
    server = start(cors_origins="https://app.example.org, http://localhost:3000")
    origin = {"Origin": "https://app.example.org"}
    wanted = {
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type",
    }
    preflight = server.http.options("/v1/classify", headers=origin | wanted)
    assert preflight.status_code == 200
    assert preflight.headers["access-control-allow-origin"] == origin["Origin"]
    answer = server.http.post("/", json=hugging_face(photo), headers=origin)
    assert answer.headers["access-control-allow-origin"] == origin["Origin"]
    exposed = answer.headers["access-control-expose-headers"].lower()
    assert {"x-request-id", "retry-after", "x-suspicion"} <= set(exposed.split(", "))
    refused = server.http.post("/", json={}, headers=origin)  # errors can be read too
    assert refused.status_code == 422
    assert refused.headers["access-control-allow-origin"] == origin["Origin"]
    other = {"Origin": "https://evil.example.org"}
    assert "access-control-allow-origin" not in server.http.get("/info", headers=other).headers
    assert server.http.options("/v1/classify", headers=other | wanted).status_code == 400


def test_by_default_no_origin_is_allowed(server: Server) -> None:
    headers = {"Origin": "https://app.example.org"}
    assert "access-control-allow-origin" not in server.http.get("/livez", headers=headers).headers


@pytest.mark.parametrize(
    ("knob", "expected"),
    [("", "'none'"), ("'self',https://portal.example.org", "'self' https://portal.example.org")],
)
def test_frame_ancestors_are_the_operators(start: START, knob: str, expected: str) -> None:
    server = start(frame_ancestors=knob)
    for path in ("/", "/docs", "/docs/start.js", "/docs/swagger-ui.css", "/playground/page.js"):
        policy = server.http.get(path).headers["content-security-policy"]
        assert policy.endswith(f"; frame-ancestors {expected}"), path


def test_an_idle_connection_is_kept_for_as_long_as_the_operator_says(start: START) -> None:
    server = start(keep_alive_s=1)
    with socket.create_connection(("127.0.0.1", server.port), 10) as client:
        client.sendall(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")
        received = b""
        while part := client.recv(65536):  # until the server closes
            received += part
        assert received.startswith(b"HTTP/1.1 200")


def test_the_ipv6_wildcard_listens_on_ipv4_too() -> None:
    if not socket.has_dualstack_ipv6():
        pytest.skip("this system has no dual-stack sockets")
    with listen("::", 0) as listener:
        port = listener.getsockname()[1]
        socket.create_connection(("127.0.0.1", port), 10).close()
        socket.create_connection(("::1", port), 10).close()


# The log.

TRACE = "0af7651916cd43dd8448eb211c80319c"


@pytest.mark.parametrize("status", [200, 422])
def test_a_log_line_has_the_trace_of_its_request(
    start: START, photo: bytes, caplog: pytest.LogCaptureFixture, status: int
) -> None:
    server = start()
    body = native(photo) if status == 200 else {}
    with caplog.at_level(logging.INFO, logger="tapt.request"):
        for parent in (f"00-{TRACE}-b7ad6b7169203331-01", "00-junk", None):
            headers = {} if parent is None else {"traceparent": parent}
            assert server.http.post("/v1/classify", json=body, headers=headers).status_code == (
                status
            )
        server.wait(lambda: len(caplog.records) == 3)
    fields = [record.fields for record in caplog.records]  # type: ignore[attr-defined]
    assert fields[0]["trace_id"] == TRACE
    assert TRACE not in (fields[1].get("trace_id"), fields[2].get("trace_id"))


# Templates.

TEMPLATES = ["a photo of a {}.", "a drawing of a {}."]


def test_several_templates_reach_the_worker_from_every_route(server: Server, photo: bytes) -> None:
    text = json.dumps(TEMPLATES)
    form: dict[str, Any] = {"labels": "cat,dog"}
    for answer in (
        server.http.post("/v1/classify", json=native(photo, hypothesis_template=TEMPLATES)),
        server.http.post("/v1/classify", json=native(photo, hypothesis_template=text)),
        server.http.post("/", json=hugging_face(photo, hypothesis_template=TEMPLATES)),
        server.http.post(
            "/v1/classify", files={"image": photo}, data=form | {"hypothesis_template": TEMPLATES}
        ),
        server.http.post(
            "/v1/classify", files={"image": photo}, data=form | {"hypothesis_template": text}
        ),
    ):
        assert answer.status_code == 200, answer.text
        assert server.worker.batches[-1][0].template == tuple(TEMPLATES)
    for one in (["[{}]"], "[{}]"):  # a list of one is a template
        answer = server.http.post("/v1/classify", json=native(photo, hypothesis_template=one))
        assert answer.status_code == 200, answer.text
        assert server.worker.batches[-1][0].template == "[{}]"


@pytest.mark.parametrize(
    ("templates", "named"),
    [
        ([], "hypothesis_template"),
        (5, "hypothesis_template`: a template is a string"),
        (["a {}", "b"], "exactly one {}"),
        (["a {}", 5], "hypothesis_template.1"),
        (["a {}", "{}" + "b" * 300], "longer than 256"),
        (["a {}"] * 4, "2 labels in 4 templates are 8 texts; the limit is 7"),
        (["a {}"] * 8, "There are 8 templates; the limit is 7"),
    ],
)
def test_several_templates_are_checked_and_limited_like_labels(
    start: START, photo: bytes, templates: Any, named: str
) -> None:
    server = start(max_labels=7)
    for path, body in (("/v1/classify", native), ("/", hugging_face)):
        answer = server.http.post(path, json=body(photo, hypothesis_template=templates))
        assert named in sentence(answer, 422)
    three = native(photo, hypothesis_template=["a {}"] * 3)
    assert server.http.post("/v1/classify", json=three).status_code == 200


def test_the_default_templates_count_against_the_limit_of_labels(
    start: START, photo: bytes
) -> None:
    server = start(hypothesis_template=TEMPLATES, max_labels=5)
    assert server.http.get("/info").json()["defaults"]["hypothesis_template"] == TEMPLATES
    for path, body in (("/v1/classify", native), ("/", hugging_face)):
        three = {"candidate_labels": ["cat", "dog", "cow"]}
        answer = server.http.post(path, json=body(photo, **three))
        assert (
            "3 labels in 2 templates of the server's default are 6 texts; the limit is 5"
        ) in sentence(answer, 422)
        one = server.http.post(path, json=body(photo, **three, hypothesis_template="a {}"))
        assert one.status_code == 200, one.text
        assert server.http.post(path, json=body(photo)).status_code == 200
        assert server.worker.batches[-1][0].template is None  # the worker has the default
    one = start().http.get("/info").json()["defaults"]["hypothesis_template"]
    assert one == "a photo of a {}."
