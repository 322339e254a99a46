"""The whole service as a user starts it: the command, the default model, real photographs."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from skimage import data
from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel

from models.shipped import EMBEDDED
from tests.real_server import COFFEE, COMMAND, LABELS, RealServer


@pytest.fixture(scope="module")
def server() -> Iterator[RealServer]:
    with RealServer("--allow-client-seed", "--max-queue-size", "64") as server:
        yield server


def test_a_photograph_gets_its_label_with_the_evidence(server: RealServer) -> None:
    answer = server.classify()
    assert answer.status_code == 200
    body = answer.json()
    assert body["labels"][0]["label"] == "espresso"
    assert sum(label["score"] for label in body["labels"]) == pytest.approx(1, abs=1e-4)
    defense = body["defense"]
    assert (defense["method"], defense["design"], defense["steps"]) == ("tapt", "vli", 1)
    assert defense["truncated"] is None


def test_the_same_seed_gives_the_same_answer_alone_and_in_company(server: RealServer) -> None:
    alone = server.classify(seed=5).json()["labels"]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda seed: server.classify(seed=seed), [5, *range(10, 17)]))
    together = answers[0].json()["labels"]
    assert [one["label"] for one in together] == [one["label"] for one in alone]
    for one, other in zip(together, alone, strict=True):
        assert one["score"] == pytest.approx(other["score"], abs=1e-4)


def test_several_default_templates_are_averaged_as_by_hand() -> None:
    # Alone, either gives the espresso less than 0.8; a template near others would not show.
    templates = ["an empty {} and a spoon", "{} seen from afar in the snow at night"]
    model = CLIPModel.from_pretrained(EMBEDDED).eval()
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED)
    processor = CLIPImageProcessor.from_pretrained(EMBEDDED)
    picture = processor(data.coffee(), return_tensors="pt")
    with torch.no_grad():
        means = []
        for label in LABELS:
            texts = [template.replace("{}", label) for template in templates]
            rows = tokenizer(texts, return_tensors="pt", padding=True)
            outputs = model(**rows, **picture)  # its embeddings have unit length
            means.append(torch.nn.functional.normalize(outputs.text_embeds.mean(dim=0), dim=-1))
        logits = model.logit_scale.exp() * torch.stack(means) @ outputs.image_embeds[0]
        scores = logits.softmax(dim=-1).tolist()
    flags = ("--model", "embedded", "--hypothesis-template", json.dumps(templates))
    with RealServer(*flags, "--dtype", "float32") as server:
        labels = server.classify(method="plain").json()["labels"]
        answer = {one["label"]: one["score"] for one in labels}
        assert answer == pytest.approx(dict(zip(LABELS, scores, strict=True)), abs=1e-2)
        refused = server.classify(method="tpt")
        assert refused.status_code == 422
        assert "adapts the words of one template" in refused.text


def test_steps_and_views_are_spent_as_asked_and_clamped(server: RealServer) -> None:
    body = server.classify(steps=100, views=1000).json()["defense"]
    assert (body["steps"], body["views"]) == (8, 64)


def test_a_short_deadline_stops_at_a_step_boundary(server: RealServer) -> None:
    server.classify(steps=0)  # a batch that this one would have to wait for is over
    answer = server.classify(steps=8, deadline_ms=700)
    assert answer.status_code in (200, 504)
    if answer.status_code == 200:
        defense = answer.json()["defense"]
        assert (defense["steps"] < 8) == (defense["truncated"] == "deadline")


def test_a_killed_worker_loses_no_request(server: RealServer) -> None:
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
    with RealServer() as server:
        with ThreadPoolExecutor(6) as pool:
            asked = [pool.submit(server.classify) for _ in range(6)]
            while server.http.get("/metrics").text.find("tapt_queue_depth 0.0") >= 0:
                time.sleep(0.01)
            time.sleep(0.2)  # all six are in
            server.process.send_signal(signal.SIGTERM)
            answers = [future.result() for future in asked]
        assert [answer.status_code for answer in answers] == [200] * 6
        assert server.process.wait(30) == 0


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
