"""Spans of real requests, caught in memory; and nothing at all where nobody asked for them."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import httpx
import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from tests.conftest import Server
from tests.fake_worker import FakeWorker, answer

pytestmark = pytest.mark.alone

CLOCK_ERROR = 10**8  # ns; two clocks are read one after the other, on a busy machine
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.fixture(scope="module")
def exporter() -> Iterator[InMemorySpanExporter]:
    """Behind the process's one tracer provider, which can be set only once and so stays."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    trace.set_tracer_provider(provider)
    yield exporter
    provider.shutdown()


@pytest.fixture
def spans(exporter: InMemorySpanExporter) -> Iterator[Callable[[], dict[str, ReadableSpan]]]:
    """Of the requests so far in this test, the last one of each name."""

    def finished() -> dict[str, ReadableSpan]:
        # A request's own span ends a moment after its client has the answer.
        limit = time.monotonic() + 10
        while time.monotonic() < limit:
            found = {span.name: span for span in exporter.get_finished_spans()}
            if any(" " in name for name in found):
                break
            time.sleep(0.01)
        return found

    exporter.clear()
    yield finished
    exporter.clear()


def classify(server: Server, photo: bytes, **headers: str) -> httpx.Response:
    return server.http.post(
        "/v1/classify",
        files={"image": photo},
        data={"labels": "secret label,dog", "steps": "3"},
        headers=headers,
    )


def test_a_request_is_a_span_of_its_callers_trace_and_its_parts_lie_in_order(
    server: Server, photo: bytes, spans: Callable[[], dict[str, ReadableSpan]]
) -> None:
    answer = classify(server, photo, traceparent=f"00-{TRACE}-{PARENT}-01")
    assert answer.status_code == 200
    found = spans()
    request = found.pop("POST /v1/classify")
    assert request.parent is not None
    assert f"{request.parent.span_id:016x}" == PARENT
    assert found.keys() == {"decode", "queue", "adapt", "predict"}
    for span in found.values():
        assert f"{span.context.trace_id:032x}" == TRACE
        assert span.parent is not None
        assert span.parent.span_id == request.context.span_id
        assert span.start_time is not None
        assert span.end_time is not None
        assert span.start_time <= span.end_time
    decode, queue, adapt, predict = (
        (found[name].start_time or 0, found[name].end_time or 0)
        for name in ("decode", "queue", "adapt", "predict")
    )
    for one, following in ((decode, queue), (queue, adapt)):
        assert one[1] <= following[0] + CLOCK_ERROR
    assert adapt[1] == pytest.approx(predict[0], abs=1000)  # ns
    timings = answer.json()["timings_ms"]
    assert (adapt[1] - adapt[0]) / 1e6 == pytest.approx(timings["adapt"], abs=0.01)
    assert 0 < (decode[1] - decode[0]) / 1e6 <= timings["decode"]


def test_the_adaptation_tells_its_steps_and_entropies_and_no_span_a_users_text(
    server: Server, photo: bytes, spans: Callable[[], dict[str, ReadableSpan]]
) -> None:
    defense = classify(server, photo).json()["defense"]
    told = spans()["adapt"].attributes
    assert told is not None
    for name in ("method", "design", "steps", "views", "entropy_before", "entropy_after"):
        assert told[f"tapt.{name}"] == defense[name]
    assert told["tapt.steps"] == 3
    everything = "".join(span.to_json() for span in spans().values())
    assert "secret label" not in everything


@pytest.mark.parametrize("suspected", [True, False, None])
def test_a_span_says_only_what_a_threshold_decided(
    start: Callable[..., Server],
    photo: bytes,
    spans: Callable[[], dict[str, ReadableSpan]],
    suspected: bool | None,
) -> None:
    server = start(FakeWorker(lambda task: replace(answer(task), suspected=suspected)))
    assert classify(server, photo).status_code == 200
    attributes = spans()["predict"].attributes
    assert attributes is not None
    assert attributes.get("tapt.suspected") is suspected
    assert ("tapt.suspected" in attributes) == (suspected is not None)


def test_probes_leave_no_span_and_a_refusal_leaves_one_with_its_status(
    server: Server, photo: bytes, spans: Callable[[], dict[str, ReadableSpan]]
) -> None:
    assert server.http.get("/readyz").status_code == 200
    assert server.http.post("/v1/classify", json={}).status_code == 422
    found = spans()
    assert found.keys() == {"POST /v1/classify"}
    attributes = found["POST /v1/classify"].attributes
    assert attributes is not None
    assert attributes["http.response.status_code"] == 422


@pytest.mark.parametrize("asked", [False, True])
def test_the_sdk_is_loaded_only_where_an_endpoint_is_named(asked: bool) -> None:
    """In a process of its own: the application starts and stops, with and without the variable."""
    code = (
        "import sys; sys.path.insert(0, 'tests')\n"
        "from fastapi.testclient import TestClient\n"
        "from fake_worker import FakeWorker\n"
        "from service.app import create_app\n"
        "from service.settings import Settings\n"
        "with TestClient(create_app(Settings(), FakeWorker())) as http:\n"
        "    assert http.get('/livez').status_code == 200\n"
        "print('opentelemetry.sdk' in sys.modules)\n"
    )
    environ = {name: value for name, value in os.environ.items() if "OTEL" not in name}
    if asked:
        environ["OTEL_EXPORTER_OTLP_ENDPOINT"] = "http://127.0.0.1:9"
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environ
    )
    assert run.stdout.strip() == str(asked)


def test_without_the_extra_an_endpoint_is_a_warning_and_the_service_serves() -> None:
    code = (
        "import sys; sys.path.insert(0, 'tests')\n"
        "sys.modules['opentelemetry.sdk'] = None  # as if it were not installed\n"
        "sys.modules['opentelemetry.exporter'] = None\n"
        "from fastapi.testclient import TestClient\n"
        "from fake_worker import FakeWorker\n"
        "from service.app import create_app\n"
        "from service.settings import Settings\n"
        "with TestClient(create_app(Settings(), FakeWorker())) as http:\n"
        "    assert http.get('/livez').status_code == 200\n"
    )
    environ = os.environ | {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9"}
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environ
    )
    assert "telemetry" in run.stderr
