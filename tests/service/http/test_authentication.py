"""Who gets in: keys in the environment and in a file, their rotation, their scopes."""

import base64
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.routing import APIRoute

from service.cli import main
from service.errors import KeysError
from service.http.authentication import ANYONE, DIAGNOSTICS, RELOAD, Keys, entry, make_key
from service.messages import Answer, Task
from service.settings import Settings
from service.telemetry.metrics import Metrics
from tests.conftest import Server
from tests.fake_worker import READY, FakeWorker, answer

START = Callable[..., Server]


class Harness:
    """Keys with a clock that the test turns."""

    def __init__(self, **knobs: Any) -> None:
        self.now = 100.0
        self.metrics = Metrics()
        self.keys = Keys(Settings(**knobs), self.metrics, lambda: self.now)

    def lets_in(self, key: str) -> bool:
        return self.keys.find(f"Bearer {key}") is not None

    @property
    def errors(self) -> float | None:
        return self.metrics.registry.get_sample_value("tapt_key_file_errors_total")

    @property
    def file_ok(self) -> float | None:
        return self.metrics.registry.get_sample_value("tapt_key_file_ok")


def test_without_keys_everybody_is_the_same_caller() -> None:
    keys = Harness().keys
    assert not keys.needed
    assert keys.find("") == keys.find("Bearer anything") == ANYONE


@pytest.mark.parametrize("listed", ["alpha", entry("alpha"), entry("alpha").upper()])
def test_a_key_is_listed_plainly_or_by_its_hash(listed: str) -> None:
    harness = Harness(api_keys=("beta", listed.replace("SHA256", "sha256")))
    caller = harness.keys.find("bearer alpha ")
    assert caller is not None
    assert caller.scopes == frozenset()
    assert caller.id == entry("alpha").removeprefix("sha256:")[:8]
    for header in (
        "",
        "alpha",
        "Bearer",
        "Bearer alph",
        "Bearer alphaa",
        "Basic alpha",
        "Bearer é",
    ):
        assert harness.keys.find(header) is None
    # The hash is no key: whoever reads the list cannot get in with it.
    assert not harness.lets_in(entry("alpha"))


def test_every_hash_is_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    import hmac

    compared: list[bytes] = []
    compare = hmac.compare_digest

    def record(one: bytes, other: bytes) -> bool:
        compared.append(other)
        return compare(one, other)

    monkeypatch.setattr("hmac.compare_digest", record)
    harness = Harness(api_keys=("alpha", "beta", "gamma"))
    for key in ("alpha", "gamma", "stranger"):
        compared.clear()
        harness.keys.find(f"Bearer {key}")
        assert len(compared) == 3


def test_a_file_is_rotated_without_a_restart(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(
        f"# the phone\n{entry('old')}\n\n{entry('staff', ['diagnostics'])}  # on call\n"
    )
    harness = Harness(api_keys_file=str(file), api_keys=("environment",))
    assert harness.lets_in("old")
    assert harness.lets_in("environment")
    assert not harness.lets_in("new")
    staff = harness.keys.find("Bearer staff")
    assert staff is not None
    assert staff.scopes == {DIAGNOSTICS}

    fresh = tmp_path / "fresh"
    fresh.write_text(entry("old") + "\n" + entry("new") + "\n")
    fresh.replace(file)
    harness.now += RELOAD
    assert harness.lets_in("new")
    assert harness.lets_in("old")
    file.write_text(entry("new") + "\n")
    harness.now += RELOAD
    assert not harness.lets_in("old")
    assert harness.errors == 0


@pytest.mark.parametrize("content", ["alpha\n", "sha256:abc\n", entry("x") + " root\n", None])
def test_a_slip_in_a_rotation_shuts_nobody_out(tmp_path: Path, content: str | None) -> None:
    file = tmp_path / "keys"
    file.write_text(entry("alpha"))
    harness = Harness(api_keys_file=str(file))
    assert harness.file_ok == 1
    if content is None:
        file.unlink()
    else:
        file.write_text(content)
    harness.now += RELOAD
    assert harness.lets_in("alpha")
    assert not harness.lets_in("x")
    assert harness.errors == 1
    for _ in range(2):  # it stays so, although a malformed file is reported once
        assert harness.file_ok == 0
        harness.now += RELOAD
        harness.keys.refresh()
    file.write_text(entry("beta") + "\n")
    harness.now += RELOAD
    assert harness.lets_in("beta")
    assert not harness.lets_in("alpha")
    assert harness.file_ok == 1


def test_a_file_that_was_away_for_a_moment_is_read_again(tmp_path: Path) -> None:
    file, aside = tmp_path / "keys", tmp_path / "aside"
    file.write_text(entry("alpha"))
    harness = Harness(api_keys_file=str(file))
    file.rename(aside)
    harness.now += RELOAD
    harness.keys.refresh()
    assert harness.file_ok == 0
    aside.rename(file)
    harness.now += RELOAD
    harness.keys.refresh()
    assert harness.file_ok == 1


def test_without_a_file_none_is_stale() -> None:
    assert Harness(api_keys=("alpha",)).file_ok == 1


def test_a_scrape_notices_a_stale_file_before_any_request(start: START, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(entry("alpha"))
    server = start(api_keys_file=str(file), open_routes="metrics")
    assert "\ntapt_key_file_ok 1.0\n" in server.http.get("/metrics").text
    file.write_text("no key\n")
    server.call(lambda: setattr(server.app.state.keys, "_checked", -RELOAD))
    assert "\ntapt_key_file_ok 0.0\n" in server.http.get("/metrics").text


def test_an_empty_file_lets_nobody_in(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(entry("alpha"))
    harness = Harness(api_keys_file=str(file))
    assert harness.lets_in("alpha")
    file.write_text("# none\n")
    harness.now += RELOAD
    assert not harness.lets_in("alpha")
    assert not Harness(api_keys_file=str(file)).lets_in("")


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (f"{entry('a')}\nplain-secret\n", "Entry 2 of keys is not"),
        ("sha256:0123", "Entry 1 of keys is not"),
        (f"{entry('a')} diagnostics admin", "Entry 1 of keys has an unknown scope"),
        (None, "No such file"),
    ],
)
def test_a_bad_file_at_the_start_is_one_sentence_without_the_key(
    tmp_path: Path, content: str | None, complaint: str
) -> None:
    file = tmp_path / "keys"
    if content is not None:
        file.write_text(content)
    with pytest.raises(KeysError, match=complaint) as caught:
        Harness(api_keys_file=str(file))
    assert "secret" not in str(caught.value)
    with pytest.raises(KeysError):
        Harness(api_keys=("sha256:0123",))


def test_every_route_but_health_asks_for_a_key(start: START) -> None:
    server = start(api_keys=entry("alpha"))
    health = {"/livez", "/readyz", "/startupz", "/health"}
    checked = set()
    for route in walk(server.app.router.routes):
        path = route.path.replace("{name}", "page.js")
        for method in route.methods or ():
            answer = server.http.request(method, path)
            assert (answer.status_code != 401) == (path in health), f"{method} {path}"
            if path not in health:
                assert method == "HEAD" or answer.json()["error_type"] == "unauthorized"
                assert answer.headers["www-authenticate"] == "Bearer"
                header = {"Authorization": "Bearer alpha"}
                assert server.http.request(method, path, headers=header).status_code != 401
            checked.add(path)
    assert checked >= health | {"/", "/v1/classify", "/info", "/metrics", "/docs", "/openapi.json"}


def walk(routes: list[Any]) -> list[Any]:
    """Every route with a path of its own, also of routers within routers."""
    found: list[Any] = []
    for route in routes:
        inner = getattr(route, "original_router", None) or getattr(route, "app", None)
        if isinstance(route, APIRoute) or hasattr(route, "methods"):
            found.append(route)
        else:
            assert inner is not None
            found += walk(inner.routes)
    return found


@pytest.mark.parametrize(
    ("key", "expose", "seen"),
    [
        ("staff", "full", True),
        ("staff", "rounded", True),
        ("staff", "label", False),
        ("other", "full", False),
        ("other", "rounded", False),
    ],
)
def test_only_keys_with_the_scope_see_diagnostics(
    start: START, photo: bytes, key: str, expose: str, seen: bool
) -> None:
    keys = f"{entry('staff', ['diagnostics'])},{entry('other')}"
    server = start(api_keys=keys, expose=expose)
    image, labels = base64.b64encode(photo).decode(), {"candidate_labels": ["attacked", "b"]}
    native, hugging = {"image": image, **labels}, {"inputs": image, "parameters": labels}
    header = {"Authorization": f"Bearer {key}"}
    defense = server.http.post("/v1/classify", json=native, headers=header).json()["defense"]
    measures = ["entropy_before", "entropy_after", "agreement", "suspicion"]
    measures += ["suspected", "undefended_label"]
    assert [defense[name] is not None for name in measures] == [seen] * 6
    assert defense["steps"] == 1
    answer = server.http.post("/", json=hugging, headers=header)
    headers = [f"x-{name.replace('_', '-')}" for name in measures]
    assert [name in answer.headers for name in headers] == [seen] * 6


@pytest.mark.parametrize(
    ("opened", "free"),
    [("pages", {"/", "/docs", "/openapi.json", "/playground/page.js"}), ("metrics", {"/metrics"})],
)
def test_pages_and_metrics_can_be_opened(start: START, opened: str, free: set[str]) -> None:
    server = start(api_keys="alpha", open_routes=opened)
    for path in ("/", "/docs", "/openapi.json", "/playground/page.js", "/metrics", "/info"):
        assert server.http.get(path).status_code == (200 if path in free else 401), path


def test_a_foreign_page_gets_nothing(start: START) -> None:
    """CORS is off: no answer allows another origin, with or without a preflight."""
    server = start()
    asked = {"Origin": "https://example.org", "Access-Control-Request-Method": "POST"}
    answers: list[httpx.Response] = [
        server.http.request(method, path, headers=asked)
        for method in ("OPTIONS", "GET", "POST")
        for path in ("/v1/classify", "/", "/info", "/health")
    ]
    for answered in answers:
        assert not [name for name in answered.headers if name.startswith("access-control")]
        if answered.request.method == "OPTIONS":
            assert answered.status_code == 405


def test_the_key_command_lists_what_it_makes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["key", "--diagnostics"]) == 0
    shown = capsys.readouterr()
    key = shown.err.split()[-1]
    caller = Harness(api_keys=(shown.out.strip(),)).keys.find(f"Bearer {key}")
    assert caller is not None
    assert caller.scopes == {DIAGNOSTICS}
    assert key not in shown.out
    assert make_key() != make_key()


def test_the_key_command_hashes_a_key_of_ones_own() -> None:
    command = [sys.executable, "-m", "service.cli", "key", "--stdin"]
    done = subprocess.run(command, input="alpha\n", capture_output=True, text=True, check=True)
    assert done.stdout.strip() == entry("alpha")
    assert done.stderr == ""
    empty = subprocess.run(command, input="\n", capture_output=True, text=True, check=False)
    assert empty.returncode == 2
    assert empty.stderr.count("\n") == 1


def test_what_an_answer_hides_is_in_no_metric_either(start: START, photo: bytes) -> None:
    """A client that reads `/metrics` before and after its own request sees the difference."""

    # Digits that no timing among the other metrics happens to hold.
    before, after, agreement = 0.1230984756, 0.4560984756, 0.7890984756
    telling = [*map(str, (before, after, agreement))]
    telling += ["suspected", "label_changed", "similarity", "agreement"]

    def reply(work: Task) -> Answer:
        return replace(
            answer(work), entropy_before=before, entropy_after=after, agreement=agreement
        )

    keys = ",".join([entry("plain"), entry("trusted", [DIAGNOSTICS])])
    server = start(FakeWorker(reply), api_keys=keys)
    image = {"image": base64.b64encode(photo).decode(), "candidate_labels": ["attacked", "b"]}

    def metrics(key: str, accept: str) -> str:
        headers = {"Authorization": f"Bearer {key}", "Accept": accept}
        return server.http.get("/metrics", headers=headers).text

    server.http.post("/v1/classify", json=image, headers={"Authorization": "Bearer plain"})
    for accept in ("text/plain", "application/openmetrics-text"):
        seen, hidden = metrics("trusted", accept), metrics("plain", accept)
        assert all(word in seen for word in telling)
        assert not [word for word in telling if word in hidden]
        assert 'tapt_requests_total{code="200",route="/v1/classify"} 1.0' in hidden


def test_the_operator_may_open_all_metrics(start: START) -> None:
    """To Prometheus, on a network of its own."""
    server = start(api_keys=entry("plain"), open_routes="metrics")
    assert "tapt_entropy_before" in server.http.get("/metrics").text


def test_thresholds_are_for_those_who_see_suspicion(start: START) -> None:
    bundle = {"design": "vli", "suspicion": {"learned": 0.5}, "false_positive_rate": 0.05}
    worker = FakeWorker(ready=replace(READY, info=READY.info | {"bundle": bundle}))
    server = start(worker, api_keys=",".join([entry("plain"), entry("trusted", [DIAGNOSTICS])]))

    def shown(key: str) -> object:
        headers = {"Authorization": f"Bearer {key}"}
        return server.http.get("/info", headers=headers).json()["bundle"]

    assert shown("trusted") == bundle
    assert shown("plain") == {"design": "vli"}


@pytest.mark.parametrize(
    "accept",
    [
        "application/openmetrics-text;version=1.x",
        "application/openmetrics-text;version=",
        "application/openmetrics-text;version=9.9.9;escaping=evil",
        "application/openmetrics-text;version=" + "9" * 5000,
        "application/openmetrics-text;version=-1.0.0",
        "text/plain;version=1.x",
        "text/plain;version=\u00b2.0.0",
        "text/plain;version=1.0.0;escaping=\u00e9",
        ";;;,=,",
        "*/*",
        "",
    ],
)
def test_no_wish_for_a_format_is_a_fault(start: START, accept: str) -> None:
    headers = {"Accept": accept.encode("latin-1")}
    answered = start().http.get("/metrics", headers=headers)  # type: ignore[arg-type]
    assert answered.status_code == 200
    assert "tapt_worker_up" in answered.text
