"""Hugging Face's own clients, unchanged, against the running server.

Other releases than the installed one are fetched once, by the registries' ordinary clients, into
`.cache`; without a registry, or without Node, their tests are skipped and the summary says so.
"""

import base64
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import InferenceClient
from huggingface_hub.errors import HfHubHTTPError

from service.settings import Settings
from tests.conftest import Server
from tests.fake_worker import answer
from tests.registries import fetch

LABELS = ["cat", "dog", "horse"]
EXPECTED = [{"label": "cat", "score": 1.0}, {"label": "dog", "score": 0.0}]


@pytest.fixture(autouse=True)
def no_token(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))


@pytest.fixture
def path(photo: bytes, tmp_path: Path) -> Path:
    file = tmp_path / "photo.jpg"
    file.write_bytes(photo)
    return file


# The installed release.


def test_the_installed_client_with_everything_it_takes(
    server: Server, photo: bytes, path: Path
) -> None:
    client = InferenceClient(model=server.url)
    for image in (photo, path, str(path)):
        ranked = client.zero_shot_image_classification(image, candidate_labels=LABELS)
        assert [(each.label, each.score) for each in ranked] == [
            ("cat", 1.0),
            ("dog", 0.0),
            ("horse", 0.0),
        ]
    client.zero_shot_image_classification(
        photo, candidate_labels=LABELS, hypothesis_template="ein Bild: {}"
    )
    assert server.worker.batches[-1][0].template == "ein Bild: {}"


def test_the_installed_client_shows_our_errors(start: Callable[..., Server], photo: bytes) -> None:
    server = start(api_keys="sesame")
    with pytest.raises(HfHubHTTPError, match="key"):
        InferenceClient(model=server.url, token="wrong").zero_shot_image_classification(
            photo, candidate_labels=LABELS
        )
    client = InferenceClient(model=server.url, token="sesame")
    with pytest.raises(HfHubHTTPError, match="a label is repeated"):
        client.zero_shot_image_classification(photo, candidate_labels=["a", "a"])
    assert client.zero_shot_image_classification(photo, candidate_labels=LABELS)


# Other releases.

ASK = """
import json, sys
from huggingface_hub import InferenceClient, __version__
assert __version__ == sys.argv[3], __version__
client = InferenceClient(model=sys.argv[1])
ranked = client.zero_shot_image_classification(sys.argv[2], ["cat", "dog"])
print(json.dumps([{"label": each["label"], "score": each["score"]} for each in ranked]))
"""


@pytest.mark.parametrize("version", ["0.20.3", "0.36.2", "1.33.0"])
def test_older_clients(server: Server, path: Path, version: str) -> None:
    """0.20 sends `{"image": ...}` and comma-separated labels."""

    def install(folder: Path) -> list[str]:
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--retries", "1"]
        return [*pip, "--timeout", "15", "--target", str(folder), f"huggingface_hub=={version}"]

    folder = fetch(f"huggingface_hub-{version}", install)
    done = subprocess.run(
        [sys.executable, "-c", ASK, server.url, str(path), version],
        env=os.environ | {"PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == EXPECTED


SCRIPT = """
import { readFileSync } from "node:fs";
import { InferenceClient } from "@huggingface/inference";
const [url, path] = process.argv.slice(2);
const ranked = await new InferenceClient().zeroShotImageClassification({
  endpointUrl: url,
  inputs: new Blob([readFileSync(path)]),
  parameters: { candidate_labels: ["cat", "dog"] },
});
console.log(JSON.stringify(ranked));
"""


def test_the_javascript_client(server: Server, path: Path) -> None:
    node, npm = shutil.which("node"), shutil.which("npm")
    if not node or not npm:
        pytest.skip("node and npm are not installed, so @huggingface/inference was not tried")

    def install(folder: Path) -> list[str]:
        quiet = ["--silent", "--no-audit", "--no-fund", "--fetch-retries=0"]
        return [npm, "install", *quiet, "--prefix", str(folder), "@huggingface/inference@4.13.30"]

    folder = fetch("huggingface-inference-4.13.30", install)
    (folder / "ask.mjs").write_text(SCRIPT)
    done = subprocess.run(
        [node, str(folder / "ask.mjs"), server.url, str(path)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == EXPECTED


# The wire format itself.


@pytest.mark.parametrize(
    "shape",
    [
        lambda image: {"inputs": image, "parameters": {"candidate_labels": ["cat", "dog"]}},
        lambda image: {"inputs": image, "parameters": {"candidate_labels": "cat, dog"}},
        lambda image: {"inputs": {"image": image}, "parameters": {"candidate_labels": "cat,dog"}},
        lambda image: {"image": image, "parameters": {"candidate_labels": ["cat", "dog"]}},
        lambda image: {"image": image, "candidate_labels": ["cat", "dog"]},
        lambda image: {
            "inputs": "data:image/jpeg;base64," + image,
            "parameters": {"candidate_labels": ["cat", "dog"], "hypothesis_template": None},
            "options": {"wait_for_model": True},
        },
    ],
    ids=["modern", "comma", "nested", "older", "flat", "options"],
)
def test_shapes(server: Server, photo: bytes, shape: Callable[[str], dict[str, Any]]) -> None:
    body = json.dumps(shape(base64.b64encode(photo).decode()))
    answer = server.http.post("/", content=body)  # older clients name no content type
    assert answer.status_code == 200, answer.text
    assert answer.json() == EXPECTED


def test_the_report_is_in_the_headers(server: Server, photo: bytes) -> None:
    body = {
        "inputs": base64.b64encode(photo).decode(),
        "parameters": {"candidate_labels": ["attacked", "größer 猫"]},
    }
    headers = server.http.post("/", json=body, headers={"X-Request-Id": "mine"}).headers
    assert headers["x-request-id"] == "mine"
    assert headers["x-defense-method"] == "tapt"
    assert headers["x-defense-steps"] == "1"
    assert headers["x-defense-views"] == str(Settings().views)
    assert headers["x-defense-views-kept"] == "1"
    assert "x-defense-truncated" not in headers
    assert float(headers["x-entropy-before"]) == 0.5
    assert float(headers["x-entropy-after"]) == 0.25
    assert float(headers["x-agreement"]) == 1.0
    assert float(headers["x-suspicion"]) == 0.0
    assert headers["x-undefended-label"] == "gr%C3%B6%C3%9Fer%20%E7%8C%AB"
    for name in ("x-queue-time", "x-inference-time", "x-total-time"):
        assert float(headers[name]) >= 0


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"\xff\xd8\xff", 400),
        (b'"text"', 422),
        (b"{}", 422),
        (b'{"inputs": "aGk=", "parameters": {}}', 422),
        (b'{"inputs": "aGk=", "parameters": {"candidate_labels": ["cat"]}}', 422),
        (b'{"inputs": "aGk=", "parameters": {"candidate_labels": ["cat", "dog"]}}', 415),
        (b'{"inputs": {"img": "aGk="}, "parameters": {"candidate_labels": "cat,dog"}}', 422),
        (b'{"inputs": "https://a.b/c.png", "parameters": {"candidate_labels": "cat,dog"}}', 422),
    ],
)
def test_errors_have_the_same_shape(server: Server, body: bytes, status: int) -> None:
    answer = server.http.post("/", content=body)
    assert answer.status_code == status, answer.text
    assert answer.json().keys() == {"error", "error_type", "request_id"}


def test_the_headers_of_the_report_are_the_documented_ones(server: Server, photo: bytes) -> None:
    server.worker.reply = lambda task: replace(answer(task), truncated="deadline")
    try:
        body = {"inputs": base64.b64encode(photo).decode(), "candidate_labels": ["cat", "dog"]}
        headers = server.http.post("/", json=body).headers
    finally:
        server.worker.reply = answer
    operation = server.http.get("/openapi.json").json()["paths"]["/"]["post"]
    documented = operation["responses"]["200"]["headers"]
    assert {name for name in headers if name.startswith("x-")} == {*map(str.lower, documented)}
    kinds: dict[str, Callable[[str], object]] = {
        "integer": int,
        "number": float,
        "boolean": json.loads,
        "string": str,
    }
    for name, header in documented.items():
        kinds[header["schema"]["type"]](headers[name])
