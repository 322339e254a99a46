"""The comparison with other servers, run on peers that are small scripts."""

import json
import sys
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import torch

from benchmarks.harness.requests import LABELS
from benchmarks.peers import __main__ as command
from benchmarks.peers import checkpoints, report
from benchmarks.peers.environment import install, last_error, versions
from benchmarks.peers.peer import Model, Peer, PeerError
from benchmarks.peers.process import PeerServer
from benchmarks.peers.trial import OPEN, run_trial
from benchmarks.sides import build_classifier
from models.bundle import load_bundle
from models.checkpoint import load_checkpoint

FAKE = Path(__file__).parent / "fake_peer.py"
MODEL = Model("none", Path(), Path())
HERE = Path(sys.executable)


class Fake(Peer):
    """A fake server, run by this Python."""

    packages = ("httpx",)

    def __init__(self, name: str, *flags: str, defended: bool = False, needs: str = "") -> None:
        self.name, self.title, self.defended = name, f"fake {name}", defended
        self.requirements = (needs,) if needs else ()
        self._flags = flags

    def command(self, python: Path, model: Model, port: int) -> list[str]:
        return [str(python), str(FAKE), str(port), *self._flags]

    def label(self, answer: Any, http: httpx.Client) -> str:
        return str(answer["label"])


class Ending(Fake):
    def command(self, python: Path, model: Model, port: int) -> list[str]:
        return [str(python), "-c", "raise SystemExit('Error: no such model | here')"]


def test_the_command_measures_every_peer_or_says_why_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = str(tmp_path / "missing")
    peers = [
        Fake("pipeline", needs=missing),
        Fake("plain"),
        Fake("tapt", defended=True),
        Fake("absent", needs=missing),
        Ending("ending"),
        Fake("wrong", "wrong"),
    ]
    monkeypatch.setattr(command, "PEERS", {peer.name: peer for peer in peers})
    pages = {"PAGE": tmp_path / "performance.md", "README": tmp_path / "README.md"}
    for name, page in pages.items():
        page.write_text("before\n<!-- peers embedded -->\nold\n<!-- /peers embedded -->\nafter\n")
        monkeypatch.setattr(command, name, page)
    out = tmp_path / "peers.json"
    flags = ["--sizes", "embedded", "--repeats", "2", "--seconds", "0.2", "--write"]
    flags += ["--cache", str(tmp_path / "cache"), "--json", str(out)]
    flags += ["--python", f"pipeline={sys.executable}"]
    monkeypatch.setattr("sys.argv", ["peers", *flags])
    assert command.main() == 0

    rows = {row["name"]: row for row in json.loads(out.read_text())["sizes"]["embedded"]}
    assert list(rows) == [peer.name for peer in peers]
    for name in ("pipeline", "plain", "tapt"):
        assert rows[name]["error"] is None
        assert rows[name]["versions"] == versions(HERE, ["httpx"])
        assert len(rows[name]["runs"]) == 2
        for run in rows[name]["runs"]:
            assert all(load["answered"] == load["sent"] > 0 for load in run["loads"].values())
            assert run["cpu_seconds"] > 0
            assert run["peak_bytes"] > 5e6
            assert set(run["labels"]) == {LABELS[1]}
            assert run["precision"] == "float32"
    assert "missing" in rows["absent"]["error"]
    assert rows["ending"]["error"] == "cannot be started: Error: no such model / here"
    assert rows["wrong"]["error"].startswith("answers 500")

    written, sentence = (page.read_text() for page in pages.values())
    assert "| fake ending |  | 0 | cannot be started: Error: no such model / here |" in written
    assert "Made by `python -m benchmarks.peers --sizes embedded" in written
    assert "times as many as fake pipeline" in sentence
    assert "fake absent: cannot be installed" in sentence
    assert all(text.startswith("before\n") and "old" not in text for text in (written, sentence))


def test_figures_are_of_all_processes_and_none_stays(tmp_path: Path) -> None:
    with PeerServer(Fake("child", "child"), HERE, MODEL) as server:
        processes = server.processes()
        assert len(processes) == 2
        assert server.cpu_seconds() >= 1
    assert server.peak_bytes > 100e6
    assert psutil.wait_procs(processes, timeout=10)[1] == []


def test_errors_under_load_are_not_answers() -> None:
    with pytest.raises(PeerError, match="answers 500"):
        run_trial(Fake("wrong", "wrong"), HERE, MODEL, seconds=0.1, seed=0)


def test_a_package_that_is_not_there_is_named() -> None:
    with pytest.raises(PeerError, match="no-such-package"):
        versions(HERE, ["no-such-package"])


def test_an_environment_is_made_once(tmp_path: Path) -> None:
    peer = Fake("empty", needs=str(tmp_path / "package"))
    (tmp_path / "package").mkdir()
    with pytest.raises(PeerError, match="cannot be installed"):
        install(peer, tmp_path)
    peer.requirements = ("pip",)
    made = tmp_path / "empty"
    (made / "requirements.txt").write_text("pip")
    assert install(peer, tmp_path) == made / "bin" / "python"


def test_the_written_checkpoint_has_its_weights_and_its_bundle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    classifier = build_classifier("embedded", "cpu", "fp32")
    monkeypatch.setattr(checkpoints, "build_classifier", lambda *_: classifier)
    model = checkpoints.prepare_model("vit-b-32", tmp_path)
    written = load_checkpoint(str(model.directory), torch.device("cpu"))
    bundle = load_bundle(model.bundle, written.clip, written.sha256)
    assert classifier.bundle is not None
    assert bundle.prompts_sha256 == classifier.bundle.prompts_sha256
    assert written.preprocessing == classifier.checkpoint.preprocessing
    own, theirs = (one.clip.model.state_dict() for one in (written, classifier.checkpoint))
    assert all(bool((own[name] == theirs[name]).all()) for name in theirs)

    monkeypatch.delattr(checkpoints, "build_classifier")  # it is written once
    assert checkpoints.prepare_model("vit-b-32", tmp_path) == model


def test_the_reason_is_the_last_error() -> None:
    assert last_error("loading\nValueError: a | b\n\nbye\n") == "ValueError: a / b"
    assert last_error("loading\n") == "loading"
    assert last_error("") == "no message"


def row(name: str, rates: list[float], *, defended: bool = False, own: bool = False) -> Any:
    """A measured peer with these answers/s for one client, and twice as many for 16."""
    runs = [
        {
            "loads": {
                report.ONE: {"answered": 5, "throughput": rate, "p50": 1 / rate, "p99": 2 / rate},
                report.MANY: {
                    "answered": 6,
                    "throughput": 2 * rate,
                    "p50": 8 / rate,
                    "p99": 9 / rate,
                },
                OPEN: {
                    "answered": 7,
                    "throughput": 1.6 * rate,
                    "p50": 3 / rate,
                    "p99": 4 / rate,
                },
            },
            "cpu_seconds": 1 / rate,
            "peak_bytes": 1e9,
            "labels": ["cat", "dog" if name == "plain" else "cat"],
            "precision": "bfloat16" if name == "plain" else "float32",
        }
        for rate in rates
    ]
    return {
        "name": name, "title": f"the {name}", "defended": defended, "own_environment": own,
        "versions": {"torch": "2"} if own else {}, "error": None, "runs": runs,
    }  # fmt: skip


ROWS = [
    row("pipeline", [10, 20, 40], own=True),
    row("plain", [30, 80, 200]),
    row("tapt", [1, 4, 5], defended=True),
]


def test_ratios_are_taken_within_a_repeat() -> None:
    table = report.ratio_table(ROWS)
    assert "| the plain | 4.00 (3.00 to 5.00) | 4.00 (3.00 to 5.00) | 0.25 (" in table
    assert (
        "| the tapt | 0.12 (0.10 to 0.20) | 0.12 (0.10 to 0.20) | 8.00 (5.00 to 10.00) |" in table
    )
    assert report.ratio_table(ROWS[1:]) == ""


def test_speeds_are_medians_and_labels_are_compared() -> None:
    lines = report.speed_table(ROWS).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[3][:6] == ["the plain", "bfloat16", "54", "80.00", "12", "25"]
    assert cells[3][-3:] == ["12.5", "1000", "1"]
    assert [line[-1] for line in cells[2:]] == ["2", "1", ""]


def test_the_sentence_gives_speed_and_price() -> None:
    failed = row("infinity", [], own=True) | {"error": "cannot be started: no"}
    text = report.headline({"sizes": {"embedded": [*ROWS, failed]}}, "embedded")
    assert "`embedded` (tapt-serve in bfloat16, the others in float32): answers per second" in text
    assert "4.0 and 4.0 times as many as the pipeline" in text
    assert "undefended ones of the pipeline: 8.0 with `tapt`." in text
    assert "the infinity: cannot be started: no." in text
    with pytest.raises(ValueError, match="plain"):
        report.headline({"sizes": {"embedded": [ROWS[0]]}}, "embedded")


def test_ours_tells_the_precision_that_it_chose() -> None:
    """A user who names no dtype gets what the service chooses, so that is what is compared."""
    answer = httpx.Response(200, json={"model": {"dtype": "bfloat16"}})
    transport = httpx.MockTransport(lambda request: answer)
    with httpx.Client(transport=transport, base_url="http://server") as http:
        assert command.PEERS["plain"].precision(http) == "bfloat16"
    said = [command.PEERS[name].command(HERE, MODEL, 1) for name in ("plain", "plain-float32")]
    assert [one[one.index("--dtype") + 1] for one in said] == ["auto", "float32"]
    assert {one[one.index("--method") + 1] for one in said} == {"plain"}
