"""`tapt-serve classify` with many images: lines in order, errors, waiting, and resuming."""

import asyncio
import io
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from service.cli import main
from service.commands import many
from service.errors import QueueFull, TooLarge, Unauthorized
from tests import tiny
from tests.conftest import Server
from tests.fake_worker import FakeWorker

START = Callable[..., Server]


@pytest.fixture
def images(photo: bytes, tmp_path: Path) -> Path:
    """Six photographs and a file that is none, in two directories."""
    directory = tmp_path / "images"
    (directory / "more").mkdir(parents=True)
    for name in ("b.jpg", "a.JPG", "c.jpeg", "more/d.png", "more/e.jpg", "more/f.jpg"):
        (directory / name).write_bytes(photo)
    (directory / "more/bad.jpg").write_text("hello")
    (directory / "notes.txt").write_text("no image")
    return directory


NAMES = ["a.JPG", "b.jpg", "c.jpeg", "more/bad.jpg", "more/d.png", "more/e.jpg", "more/f.jpg"]


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_a_directory_is_a_line_for_each_image_in_order(
    start: START, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # The first takes longest; the order is that of the files all the same.
    worker = FakeWorker(seconds=lambda batch: 0.3 if sum(map(len, worker.batches)) == 1 else 0.0)
    server = start(worker)
    arguments = ["classify", str(images), "--labels", "cat,dog", "--url", server.url]
    assert main([*arguments, "--top-k", "1"]) == 1
    shown = capsys.readouterr()
    found = lines(shown.out)
    assert [line["file"] for line in found] == [str(images / name) for name in NAMES]
    for line in found:
        if line["file"].endswith("bad.jpg"):
            assert line["error_type"] == "unsupported_image"
            assert line["error"].startswith("The image is not one of")
            assert "labels" not in line
        else:
            assert line["labels"] == [{"label": "cat", "score": 1.0}]
            assert line["defense"]["method"] == "tapt"
    assert "classifying" in shown.err
    assert shown.err.endswith("1 of 7 files failed.\n")


def test_files_and_a_list_on_standard_input(
    server: Server, images: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    listed = f"{images / 'c.jpeg'}\n{images / 'b.jpg'}\r\n\n{images / 'none.jpg'}\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(listed.encode())))
    first = str(images / "b.jpg")
    assert main(["classify", first, "-", "--labels", "a,b", "--url", server.url]) == 1
    found = lines(capsys.readouterr().out)
    assert [Path(line["file"]).name for line in found] == ["b.jpg", "c.jpeg", "none.jpg"]
    assert found[2]["error"] == "No such file or directory"
    assert found[2]["error_type"] == "unreadable"


def test_a_run_resumes_and_ends_in_order(start: START, images: Path, tmp_path: Path) -> None:
    output = tmp_path / "answers.jsonl"
    worker = FakeWorker()
    server = start(worker)
    arguments = ["classify", str(images), "--labels", "cat,dog", "--url", server.url]
    arguments += ["--output", str(output)]
    assert main(arguments) == 1
    first = lines(output.read_text())
    assert sum(map(len, worker.batches)) == 6

    # Killed: some lines are missing, the last is torn. One file is mended meanwhile.
    kept = output.read_text().splitlines()[1:4]
    output.write_text("\n".join(kept) + '\n{"file": "torn')
    (images / "more/bad.jpg").write_bytes((images / "b.jpg").read_bytes())
    assert main(arguments) == 0
    again = lines(output.read_text())
    assert [line["file"] for line in again] == [str(images / name) for name in NAMES]
    assert not [line for line in again if "error" in line]
    assert again[1:3] == first[1:3]  # not asked for again
    assert sum(len(batch) for batch in worker.batches) == 6 + 5
    assert main(arguments) == 0
    assert sum(len(batch) for batch in worker.batches) == 6 + 5


ODD_NAMES = [
    b"caf\xe9.jpg",  # Latin-1
    "line\u2028paragraph\u2029next\u0085.jpg".encode(),
    "пёс 犬.jpg".encode(),
    b"carriage\rreturn.jpg",
]


@pytest.mark.parametrize("listed", [False, True], ids=["a directory", "standard input"])
def test_a_run_resumes_with_any_name_that_a_file_may_have(
    start: START, photo: bytes, tmp_path: Path, monkeypatch: Any, listed: bool
) -> None:
    directory = os.fsencode(tmp_path / "images")
    os.mkdir(directory)
    paths = sorted((os.path.join(directory, name) for name in ODD_NAMES), key=os.fsdecode)
    for path in paths:
        Path(os.fsdecode(path)).write_bytes(photo)
    output = tmp_path / "answers.jsonl"
    worker = FakeWorker()
    server = start(worker)
    source = "-" if listed else os.fsdecode(directory)
    arguments = ["classify", source, "--labels", "hé,犬\u2028", "--url", server.url]
    for _ in range(2):  # the second finds all answers
        list_ = io.TextIOWrapper(io.BytesIO(b"\n".join(paths)), encoding="utf-8")
        monkeypatch.setattr(sys, "stdin", list_)
        assert main([*arguments, "--output", str(output)]) == 0
        found = [json.loads(line) for line in output.read_text("utf-8").splitlines()]
        assert [os.fsencode(line["file"]) for line in found] == paths
        assert sum(map(len, worker.batches)) == len(ODD_NAMES)


def test_names_that_are_no_utf_8_are_printed(
    start: START, photo: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [os.fsdecode(os.path.join(os.fsencode(tmp_path), name)) for name in ODD_NAMES]
    for name in names:
        Path(name).write_bytes(photo)
    assert main(["classify", *names, "--labels", "a,b", "--url", start().url]) == 0
    found = capsys.readouterr().out
    assert found.isascii()
    assert [line["file"] for line in lines(found)] == names


def test_files_of_older_versions_are_resumed(
    start: START, photo: bytes, tmp_path: Path, monkeypatch: Any
) -> None:
    """They hold separators and letters as they are, and perhaps half a letter at the end."""
    names = [str(tmp_path / "line\u2028é.jpg"), str(tmp_path / "b.jpg")]
    for name in names:
        Path(name).write_bytes(photo)
    output = tmp_path / "answers.jsonl"
    worker = FakeWorker()
    arguments = ["classify", *names, "--labels", "a,b", "--url", start(worker).url]
    arguments += ["--output", str(output)]
    assert main(arguments) == 0
    old = [json.dumps(line, ensure_ascii=False) for line in lines(output.read_text("utf-8"))]
    assert "\u2028é" in old[0]
    output.write_bytes(f"{old[0]}\n".encode() + '{"file": "é'.encode()[:-1])
    assert main(arguments) == 0
    assert sum(map(len, worker.batches)) == 2 + 1
    found = [json.loads(line) for line in output.read_text("utf-8").strip().split("\n")]
    assert [line["file"] for line in found] == names


def test_a_name_that_no_file_can_have_is_a_line(
    server: Server, images: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    """For example of a list that ends its names by NUL."""
    list_ = io.TextIOWrapper(io.BytesIO(b"a.jpg\0b.jpg\0\n"))
    monkeypatch.setattr(sys, "stdin", list_)
    first = str(images / "b.jpg")
    assert main(["classify", "-", first, "--labels", "a,b", "--url", server.url]) == 1
    found = lines(capsys.readouterr().out)
    assert [line["file"] for line in found] == ["a.jpg\0b.jpg\0", first]
    assert [line.get("error_type") for line in found] == ["unreadable", None]


def test_answers_to_another_question_are_not_mixed(
    server: Server, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "answers.jsonl"
    arguments = ["classify", str(images / "b.jpg"), "--url", server.url, "--output", str(output)]
    assert main([*arguments, "--labels", "cat,dog"]) == 0
    before = output.read_text()
    for other in (["--labels", "cat,cow"], ["--labels", "cat,dog", "--steps", "3"]):
        assert main([*arguments, *other]) == 2
        assert "holds answers to other labels" in capsys.readouterr().err
    output.write_text("my notes\n")
    assert main([*arguments, "--labels", "cat,dog"]) == 2
    assert output.read_text() == "my notes\n"
    assert before


def test_a_busy_server_is_asked_again_when_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    really_sleep = asyncio.sleep

    async def sleep(seconds: float) -> None:
        if threading.current_thread() is threading.main_thread():  # not the server of other tests
            slept.append(seconds)
        else:
            await really_sleep(seconds)

    asked = 0

    async def classify(file: bytes) -> dict[str, Any]:
        nonlocal asked
        asked += 1
        if asked < 3:
            raise QueueFull("The queue is full.", retry_after=asked * 7.0)
        return {"labels": []}

    monkeypatch.setattr("service.commands.many.asyncio.sleep", sleep)
    line = asyncio.run(many.classify_file(__file__, classify))
    assert line == {"file": __file__, "labels": []}
    assert slept == [7.0, 14.0]


@pytest.mark.parametrize(
    ("error", "ends"), [(TooLarge("Too large."), False), (Unauthorized("No."), True)]
)
def test_what_concerns_one_file_is_a_line_and_what_concerns_all_ends_the_run(
    error: Exception, ends: bool
) -> None:
    async def classify(file: bytes) -> dict[str, Any]:
        raise error

    if ends:
        with pytest.raises(Unauthorized):
            asyncio.run(many.classify_file(__file__, classify))
    else:
        line = asyncio.run(many.classify_file(__file__, classify))
        assert line == {"file": __file__, "error": "Too large.", "error_type": "too_large"}


@pytest.mark.parametrize("concurrency", [1, 3])
def test_concurrency_is_bounded_and_results_are_in_order(concurrency: int) -> None:
    running, most = 0, 0

    async def work(name: str) -> dict[str, Any]:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.02 if int(name) % 3 == 0 else 0.001)
        running -= 1
        return {"file": name}

    async def run() -> list[str]:
        names = [str(number) for number in range(12)]
        return [line["file"] async for line in many.in_order(names, work, concurrency)]

    assert asyncio.run(run()) == [str(number) for number in range(12)]
    assert most == concurrency


def test_a_server_that_is_gone_ends_the_run(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.setattr(many, "RECONNECT_WAIT", 0.01)
    output = tmp_path / "answers.jsonl"
    arguments = ["classify", str(images), "--labels", "a,b", "--url", "http://127.0.0.1:9"]
    assert main([*arguments, "--output", str(output)]) == 1
    shown = capsys.readouterr().err
    assert "Interrupted. The same command resumes." in shown
    assert "cannot be reached" in shown
    assert output.read_text() == ""


def test_a_key_is_sent(
    start: START, images: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    server = start(api_keys="sesame")
    one = str(images / "b.jpg")
    for sources in ([one], [one, str(images / "c.jpeg")]):
        arguments = ["classify", *sources, "--labels", "a,b", "--url", server.url]
        assert main(arguments) == 1
        assert "A valid API key is needed." in capsys.readouterr().err
        assert main([*arguments, "--key", "sesame"]) == 0
        monkeypatch.setenv("TAPT_KEY", "sesame")
        assert main(arguments) == 0
        assert main(["info", "--url", server.url]) == 0
        monkeypatch.delenv("TAPT_KEY")
        capsys.readouterr()
        assert main([*arguments, "--key", "sésame"]) == 2
        assert capsys.readouterr().err == "The key to send is not ASCII.\n"


def test_a_file_over_the_limit_keeps_the_servers_sentence(
    start: START, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server = start(max_body_bytes=2**20)
    file = tmp_path / "large.jpg"
    file.write_bytes(bytes(20 * 2**20))
    sentence = f"The body is larger than {2**20} bytes."
    again = ["classify", str(file), str(tmp_path / "none"), "--labels", "a,b", "--url", server.url]
    assert main(again) == 1
    assert lines(capsys.readouterr().out)[0]["error"] == sentence


def test_a_local_run_goes_through_the_engine(images: Path, tmp_path: Path) -> None:
    """As a process: a worker and decoders start, with a tiny model."""
    model = tiny.save_checkpoint(tmp_path / "model")
    command = [sys.executable, "-m", "service.cli", "classify", str(images), "--labels", "cat,dog"]
    command += ["--model", str(model), "--method", "ensemble", "--views", "4"]
    command += ["--output", str(tmp_path / "out.jsonl"), "--template", "a {}", "--template", "{}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1, done.stderr
    assert "1 of 7 files failed." in done.stderr
    found = lines((tmp_path / "out.jsonl").read_text())
    assert [line["file"] for line in found] == [str(images / name) for name in NAMES]
    good = [line for line in found if "error" not in line]
    assert len(good) == 6
    assert {line["defense"]["method"] for line in good} == {"ensemble"}
    assert [line["error_type"] for line in found if "error" in line] == ["unsupported_image"]


def test_a_model_that_cannot_be_loaded_is_one_sentence(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["classify", str(images), "--labels", "a,b", "--model", str(tmp_path / "none")]
    done = subprocess.run(
        [sys.executable, "-m", "service.cli", *command], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1
    assert str(tmp_path / "none") in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_an_empty_directory_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["classify", str(tmp_path), "--labels", "a,b"]) == 2
    assert "there are no images" in capsys.readouterr().err
