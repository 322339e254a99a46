"""The whole service as a user starts it: the command, the embedded model, real photographs."""

import base64
import io
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from PIL import Image
from skimage import data

COMMAND = Path(sys.executable).with_name("tapt-serve")
LABELS = ["espresso", "school bus", "volleyball", "lemon", "dog"]


def png(pixels: object) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")  # type: ignore[arg-type]
    return out.getvalue()


COFFEE = png(data.coffee())


class Process:
    """`tapt-serve serve` on a free port, ready to be asked."""

    def __init__(self, *flags: str) -> None:
        self.process = subprocess.Popen(
            [COMMAND, "serve", "--port", "0", *flags],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        found = re.search(r"http://\S+", line)
        assert found, f"no address in {line!r}"
        self.url = found.group()
        self.http = httpx.Client(base_url=self.url, timeout=60)

    def classify(self, **defense: object) -> httpx.Response:
        body = {
            "image": base64.b64encode(COFFEE).decode(),
            "candidate_labels": LABELS,
            "defense": defense or None,
        }
        return self.http.post("/v1/classify", json=body)

    def workers(self) -> list[int]:
        """Process ids of the worker processes."""
        command = ["ps", "-A", "-ww", "-o", "pid=,ppid=,args="]
        listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        lines = [line.split(maxsplit=2) for line in listed.splitlines()]
        ours = [line for line in lines if line[1] == str(self.process.pid)]
        return [int(pid) for pid, _, args in ours if "spawn_main" in args]

    def close(self) -> None:
        self.http.close()
        self.process.kill()
        self.process.communicate()


@pytest.fixture(scope="module")
def server() -> Iterator[Process]:
    process = Process("--allow-client-seed", "--max-queue-size", "64")
    yield process
    process.close()


def test_a_photograph_gets_its_label_with_the_evidence(server: Process) -> None:
    answer = server.classify()
    assert answer.status_code == 200
    body = answer.json()
    assert body["labels"][0]["label"] == "espresso"
    assert sum(label["score"] for label in body["labels"]) == pytest.approx(1, abs=1e-4)
    defense = body["defense"]
    assert (defense["method"], defense["design"], defense["steps"]) == ("tapt", "vli", 1)
    assert defense["truncated"] is None


def test_the_same_seed_gives_the_same_answer_alone_and_in_company(server: Process) -> None:
    alone = server.classify(seed=5).json()["labels"]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda seed: server.classify(seed=seed), [5, *range(10, 17)]))
    together = answers[0].json()["labels"]
    assert [one["label"] for one in together] == [one["label"] for one in alone]
    for one, other in zip(together, alone, strict=True):
        assert one["score"] == pytest.approx(other["score"], abs=1e-4)


def test_steps_and_views_are_spent_as_asked_and_clamped(server: Process) -> None:
    body = server.classify(steps=100, views=1000).json()["defense"]
    assert (body["steps"], body["views"]) == (8, 64)


def test_a_short_deadline_stops_at_a_step_boundary(server: Process) -> None:
    server.classify(steps=0)  # a batch that this one would have to wait for is over
    answer = server.classify(steps=8, deadline_ms=700)
    assert answer.status_code in (200, 504)
    if answer.status_code == 200:
        defense = answer.json()["defense"]
        assert (defense["steps"] < 8) == (defense["truncated"] == "deadline")


def test_a_killed_worker_loses_no_request(server: Process) -> None:
    with ThreadPoolExecutor(20) as pool:
        asked = [pool.submit(server.classify) for _ in range(20)]
        time.sleep(0.3)
        (victim,) = server.workers()
        assert sum(not future.done() for future in asked) >= 4  # there is something to lose
        os.kill(victim, signal.SIGKILL)
        fell = False
        limit = time.monotonic() + 60
        while not (fell and server.http.get("/readyz").status_code == 200):
            assert time.monotonic() < limit
            fell = fell or server.http.get("/readyz").status_code == 503
            assert server.http.get("/livez").status_code == 200
            time.sleep(0.02)
        answers = [future.result() for future in asked]
    assert [answer.status_code for answer in answers] == [200] * 20
    assert server.workers() != [victim]


def test_sigterm_answers_what_was_accepted_and_exits_cleanly() -> None:
    process = Process()
    try:
        with ThreadPoolExecutor(6) as pool:
            asked = [pool.submit(process.classify) for _ in range(6)]
            while process.http.get("/metrics").text.find("tapt_queue_depth 0.0") >= 0:
                time.sleep(0.01)
            time.sleep(0.2)  # all six are in
            process.process.send_signal(signal.SIGTERM)
            answers = [future.result() for future in asked]
        assert [answer.status_code for answer in answers] == [200] * 6
        assert process.process.wait(30) == 0
    finally:
        process.close()


def test_the_command_classifies_without_a_server(tmp_path: Path) -> None:
    (tmp_path / "coffee.png").write_bytes(COFFEE)
    run = subprocess.run(
        [COMMAND, "classify", tmp_path / "coffee.png", "--labels", ",".join(LABELS)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "NO_COLOR": "1", "COLUMNS": "100"},
    )
    rows = [line for line in run.stdout.splitlines() if any(label in line for label in LABELS)]
    assert "espresso" in rows[0]
    assert "undefended" in run.stdout


def test_a_wrong_model_is_one_sentence_and_a_failure() -> None:
    run = subprocess.run(
        [COMMAND, "serve", "--port", "0", "--model", "/nowhere/at/all"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert run.returncode == 1
    assert "Traceback" not in run.stderr
    assert "/nowhere/at/all is neither a directory nor a hub id" in run.stderr
