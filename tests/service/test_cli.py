"""The command: its flags, its mistakes, and the life of the server process."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import types
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.app import create_app
from service.cli import main
from service.errors import ModelError
from service.messages import Answer, Failure, Task
from service.server import announce, warn_of_open_access
from service.settings import Settings, injected_variables
from tests.conftest import Server
from tests.fake_worker import READY, FakeWorker, answer

TESTS = Path(__file__).parents[1]


@pytest.fixture
def image(photo: bytes, tmp_path: Path) -> Path:
    file = tmp_path / "photo.jpg"
    file.write_bytes(photo)
    return file


class FakeRunner:
    """What `service.worker.runner.Runner` is to the command, without torch."""

    ready = READY
    asked: Task

    def __init__(self, settings: Settings, index: int) -> None:
        if settings.model == "broken":
            raise ModelError("The model `broken` cannot be loaded.")

    def run(
        self,
        batch: list[Task],
        settle: Callable[[str, Answer | Failure], None],
        cancelled: Callable[[str], bool],
    ) -> dict[str, int]:
        for work in batch:
            FakeRunner.asked = work
            settle(work.id, answer(work))
        return {}


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("service.worker.runner")
    module.Runner = FakeRunner  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "service.worker.runner", module)


# Flags and mistakes.


@pytest.mark.parametrize("command", ["serve", "classify", "info"])
def test_each_knob_has_a_flag_with_its_default_and_variable(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit:
        main([command, "--help"])
    assert exit.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for name in Settings.model_fields:
        assert re.search(rf"--{name.replace('_', '-')}[ ,]", text), name
        assert f"env: TAPT_{name.upper()}]" in text


@pytest.mark.parametrize("arguments", [["--help"], ["serve", "--help"]])
def test_help_needs_no_torch(arguments: list[str]) -> None:
    code = f"""
    import sys
    from service.cli import main
    try:
        main({arguments})
    except SystemExit:
        pass
    assert not {{"torch", "transformers"}} & sys.modules.keys()
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, capture_output=True)


def test_unknown_variables_are_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TAPT_MAX_VEIWS", "1")
    assert main(["info"]) == 2
    assert capsys.readouterr().err == (
        "Unknown variable: TAPT_MAX_VEIWS; see docs/configuration.md.\n"
    )


KUBERNETES = {
    "TAPT_SERVE_SERVICE_HOST": "10.96.0.12",
    "TAPT_SERVE_SERVICE_PORT": "80",
    "TAPT_SERVE_SERVICE_PORT_HTTP": "80",
    "TAPT_SERVE_PORT": "tcp://10.96.0.12:80",
    "TAPT_SERVE_PORT_80_TCP": "tcp://10.96.0.12:80",
    "TAPT_SERVE_PORT_80_TCP_PROTO": "tcp",
    "TAPT_SERVE_PORT_80_TCP_PORT": "80",
    "TAPT_SERVE_PORT_80_TCP_ADDR": "10.96.0.12",
    "TAPT_SERVICE_HOST": "10.96.0.12",
    "TAPT_PORT_8000_TCP": "tcp://10.96.0.12:8000",
    "TAPT_PORT": "tcp://10.96.0.12:8000",
}


@pytest.mark.parametrize("name", KUBERNETES)
def test_variables_of_kubernetes_are_explained(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    monkeypatch.setenv(name, KUBERNETES[name])
    assert main(["info"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"Kubernetes set {name} for a Service")
    assert "enableServiceLinks: false" in error
    assert len(error.splitlines()) == 1


def test_no_knob_looks_like_a_variable_of_kubernetes() -> None:
    own = {f"TAPT_{name.upper()}": "1" for name in Settings.model_fields}
    assert injected_variables(own) == []
    assert injected_variables({"TAPT_PROT": "1", "TAPT_SERVE_REPORT": "x"}) == []


def test_the_key_of_a_client_does_not_pass_for_that_of_a_server(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TAPT_KEY", "sesame")
    assert main(["serve"]) == 2
    error = capsys.readouterr().err
    assert "TAPT_API_KEYS" in error
    assert "sesame" not in error


@pytest.mark.parametrize("command", ["serve", "classify", "info"])
def test_help_shows_first_what_matters_most(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    text = capsys.readouterr().out
    assert text.index("\nsettings:") < text.index("--model VALUE") < text.index("\nother settings:")
    assert text.index("\nother settings:") < text.index("--root-path")


def test_each_wrong_value_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--port", "99999", "--views", "many", "--api-keys", "sesame"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in lines] == ["--port (TAPT_PORT)", "--views (TAPT_VIEWS)"]
    assert main(["serve", "--views", "65"]) == 2
    assert capsys.readouterr().err == "views (65) is above max_views (64)\n"


def test_a_flag_wins_over_its_variable(
    monkeypatch: pytest.MonkeyPatch, runner: None, image: Path
) -> None:
    monkeypatch.setenv("TAPT_STEPS", "2")
    assert main(["classify", str(image), "--labels", "a,b"]) == 0
    assert FakeRunner.asked.steps == 2
    assert main(["classify", str(image), "--labels", "a,b", "--steps", "3"]) == 0
    assert FakeRunner.asked.steps == 3


@pytest.mark.parametrize(
    ("command", "module"),
    [
        ("calibrate", "models.calibration.calibrate"),
        ("evaluate", "models.evaluation.command"),
        ("harden", "models.calibration.harden"),
    ],
)
@pytest.mark.parametrize(
    ("given", "passed"),
    [
        (["--data", "d"], ["--model", "org/name", "--tokenizer", "org/words", "--data", "d"]),
        (["--tokenizer", "t"], ["--model", "org/name", "--tokenizer", "t"]),
        (["--model", "other"], ["--model", "other"]),
        (["--model=other"], ["--model=other"]),
    ],
)
def test_other_commands_take_model_and_tokenizer_of_serve(
    monkeypatch: pytest.MonkeyPatch, command: str, module: str, given: list[str], passed: list[str]
) -> None:
    seen: list[list[str]] = []

    def note(arguments: list[str]) -> int:
        seen.append(arguments)
        return 0

    monkeypatch.setattr(f"{module}.main", note)
    monkeypatch.setenv("TAPT_MODEL", "org/name")
    monkeypatch.setenv("TAPT_TOKENIZER", "org/words")
    assert main([command, *given]) == 0
    monkeypatch.delenv("TAPT_MODEL")
    monkeypatch.delenv("TAPT_TOKENIZER")
    assert main([command, *given]) == 0
    assert seen == [passed, given]


# classify and info.


def test_classify_prints_a_table(
    runner: None, image: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["classify", str(image), "--labels", "attacked,dog"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"label\W+undefended\W+defended", out)
    assert re.search(r"attacked\W+0\.000\W+1\.000", out)
    said = " ".join(out.split())
    assert "Undefended CLIP says dog, the defense says attacked." in said
    assert "entropy 0.50 to 0.25 nats, 100% of the views agree" in said
    assert "tapt (vli): 1 steps, 1 of 16 views kept" in said


def test_classify_prints_json(
    runner: None, image: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--labels", "a,b", "--labels", "c", "--json", "--seed", "5", "--top-k", "1"]
    assert main(["classify", str(image), *arguments]) == 0
    body = json.loads(capsys.readouterr().out)
    assert body["labels"] == [{"label": "a,b", "score": 1.0}]
    assert [scored["label"] for scored in body["undefended"]] == ["a,b", "c"]
    assert FakeRunner.asked.seed == 5


def test_classify_asks_a_server(
    server: Server, image: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--labels", "a,b", "--url", server.url + "/", "--steps", "4", "--json"]
    assert main(["classify", str(image), *arguments]) == 0
    body = json.loads(capsys.readouterr().out)
    assert body["defense"]["steps"] == 4
    assert body["undefended"][0] == {"label": "a", "score": 1.0}
    assert main(["classify", str(image), "--labels", "a,b", "--url", server.url]) == 0
    assert "Both say a." in capsys.readouterr().out
    assert main(["info", "--url", server.url]) == 0
    assert re.search(r"limits\.max_labels\W+1000", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["--labels", "a"], 2, "at least two labels"),
        (["--labels", "a,b", "--url", "http://127.0.0.1:9"], 1, "cannot be reached"),
        (["--labels", "a,b", "--model", "broken"], 1, "cannot be loaded"),
    ],
)
def test_what_goes_wrong_is_one_line(
    runner: None,
    image: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
    sentence: str,
) -> None:
    assert main(["classify", str(image), *arguments]) == code
    err = capsys.readouterr().err
    assert sentence in err
    assert len(err.splitlines()) == 1


def test_images_that_cannot_be_read(
    runner: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["classify", str(tmp_path / "none.jpg"), "--labels", "a,b"]) == 1
    assert capsys.readouterr().err == f"{tmp_path / 'none.jpg'}: No such file or directory\n"
    (tmp_path / "text.jpg").write_text("hello")
    assert main(["classify", str(tmp_path / "text.jpg"), "--labels", "a,b"]) == 1
    assert "not one of: JPEG" in capsys.readouterr().err


def test_info_prints_the_models_facts(runner: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"model": {"name": "fake"}}
    assert main(["info"]) == 0
    assert capsys.readouterr().out == "model.name  fake\n"


def test_a_long_value_stays_on_its_line(
    runner: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = "0123456789abcdef" * 20
    ready = replace(READY, info={"model": {"sha256": digest}, "n": 1})
    monkeypatch.setattr(FakeRunner, "ready", ready)
    monkeypatch.setenv("COLUMNS", "40")
    assert main(["info"]) == 0
    assert capsys.readouterr().out == f"model.sha256  {digest}\nn             1\n"


# serve, as a process of its own.

SERVE = """
import asyncio
import sys
sys.path.insert(0, sys.argv[1])
from fake_worker import FakeWorker
from service.server import serve
from service.settings import Settings

class Doomed(FakeWorker):
    def be_ready(self):
        self.give_up("The model cannot be loaded.")

class Exhausted(FakeWorker):
    def run(self, batch):
        asyncio.get_running_loop().call_later(0.5, self.die, True)

workers = {
    "slow": lambda: FakeWorker(seconds=lambda batch: 5.0),
    "doomed": Doomed,
    "exhausted": Exhausted,
}
sys.exit(serve(Settings(port=0, log_format=sys.argv[3]), workers[sys.argv[2]]()))
"""


def serve(kind: str, log_format: str = "json") -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", SERVE, str(TESTS), kind, log_format],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_sigterm_drains_and_ends_well(photo: bytes) -> None:
    with serve("slow") as process:
        assert process.stdout is not None
        url = json.loads(process.stdout.readline())["url"]
        answers: list[httpx.Response] = []

        def ask() -> None:
            parts: dict[str, Any] = {"files": {"image": photo}, "data": {"labels": "a,b"}}
            answers.append(httpx.post(url + "/v1/classify", **parts, timeout=20))

        client = threading.Thread(target=ask)
        client.start()
        while "tapt_batch_size_count 1.0" not in httpx.get(url + "/metrics").text:
            pass
        process.send_signal(signal.SIGTERM)
        while (readiness := httpx.get(url + "/readyz")).status_code == 200:
            pass
        assert readiness.status_code == 503
        assert httpx.get(url + "/livez").status_code == 200
        refused = httpx.post(url + "/v1/classify", json={})
        assert refused.status_code == 503
        assert "retry-after" in refused.headers
        client.join()
        assert answers[0].status_code == 200
        out, err = process.communicate(timeout=20)
        assert process.returncode == 0
        assert out == ""
        lines = [json.loads(line) for line in err.splitlines()]
        assert "shutting down: running requests have 65 s to finish" in {
            line["message"] for line in lines
        }
        assert {"/v1/classify"} == {line["route"] for line in lines if "route" in line}
        assert {200, 503} == {line["status"] for line in lines if "status" in line}


def test_a_model_that_cannot_be_served_ends_the_process() -> None:
    with serve("doomed", "text") as process:
        out, err = process.communicate(timeout=20)
    assert process.returncode == 1
    assert err == "The model cannot be loaded.\n"
    assert out == ""


def test_a_json_log_holds_only_json() -> None:
    with serve("doomed") as process:
        out, err = process.communicate(timeout=20)
    assert process.returncode == 1
    (line,) = (json.loads(line) for line in err.splitlines())
    assert (line["level"], line["message"]) == ("critical", "The model cannot be loaded.")
    assert out == ""


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_workers_that_cannot_be_started_end_the_process(photo: bytes, log_format: str) -> None:
    with serve("exhausted", log_format) as process:
        assert process.stdout is not None
        found = re.search(r'http://[^\s"]+', process.stdout.readline())
        assert found is not None
        answer = httpx.post(
            f"{found[0]}/v1/classify", files={"image": photo}, data={"labels": "a,b"}, timeout=20
        )
        assert answer.status_code == 503
        assert "retry-after" in answer.headers
        _, err = process.communicate(timeout=20)
    assert process.returncode == 1
    sentence = "No worker can be started: killed by the test"
    last = err.splitlines()[-1]
    assert (json.loads(last)["message"] if log_format == "json" else last) == sentence


def test_a_text_log_says_where_it_listens() -> None:
    with serve("slow", "text") as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=20)
    assert re.fullmatch(r"listening on http://127\.0\.0\.1:\d+\n", line)


def test_a_json_log_says_which_model_is_served() -> None:
    facts = {"name": "m", "sha256": "ab", "dtype": "float32", "device": "cpu"}
    engine = types.SimpleNamespace(info={"model": facts, "bundle": {"prompts_sha256": "cd"}})
    line = json.loads(announce("http://h:1", engine, Settings(log_format="json")))  # type: ignore[arg-type]
    assert datetime.fromisoformat(line.pop("time"))
    assert line == {
        "level": "info",
        "logger": "tapt.server",
        "message": "listening on http://h:1",
        "url": "http://h:1",
        "model": "m",
        "model_sha256": "ab",
        "bundle_sha256": "cd",
        "dtype": "float32",
        "device": "cpu",
    }


@pytest.mark.parametrize(
    ("host", "keys", "told"),
    [
        ("127.0.0.1", (), ""),
        ("::1", (), ""),
        ("0.0.0.0", (), "0.0.0.0:8000"),
        ("::", (), "[::]:8000"),
        ("192.0.2.1", (), "192.0.2.1:8000"),
        ("192.0.2.1", ("sha256:" + "0" * 64,), ""),
    ],
)
def test_a_server_that_anybody_may_use_says_so(
    host: str, keys: tuple[str, ...], told: str, caplog: pytest.LogCaptureFixture
) -> None:
    app = create_app(Settings(api_keys=keys), FakeWorker())
    warn_of_open_access(app, host, 8000)
    expected = (
        f"No API keys are configured: every client that reaches {told} may classify and see "
        "diagnostics."
    )
    assert caplog.messages == ([expected] if told else [])


def test_a_taken_port_is_one_sentence() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = subprocess.run(
            [sys.executable, "-m", "service.cli", "serve", "--port", str(port)],
            capture_output=True,
            text=True,
            env={name: value for name, value in os.environ.items() if "TAPT" not in name},
        )
    assert done.returncode == 1
    assert done.stderr == f"Cannot listen on 127.0.0.1:{port}: Address already in use.\n"
