"""Asks the service from inside its own container, and looks at what the container is made of.

Piped to the image's Python; only what the image holds is there to be used. Ends with a status
other than 0 at the first thing that is not as it should be.
"""

import base64
import io
import json
import os
import shutil
import time
import urllib.error
import urllib.request
from typing import Any

from PIL import Image

URL = f"http://127.0.0.1:{os.environ.get('TAPT_PORT', '8000')}"
PATIENCE = 180.0  # seconds until the model is loaded
TOOLS = ("pip", "gcc", "cc", "make", "git", "curl", "wget")


def ask(path: str, body: object = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json", "X-Request-Id": "smoke"}
    request = urllib.request.Request(URL + path, data, headers)
    with urllib.request.urlopen(request, timeout=60) as answer:
        assert answer.headers["X-Request-Id"] == "smoke", "the request id is not echoed"
        text = answer.read().decode()
    return json.loads(text) if answer.headers["Content-Type"] == "application/json" else text


def wait() -> float:
    """Seconds until the service was ready."""
    began = time.monotonic()
    while True:
        try:
            ask("/readyz")
            return time.monotonic() - began
        except OSError:
            assert time.monotonic() - began < PATIENCE, "the service does not become ready"
            time.sleep(0.2)


def writable(directory: str) -> bool:
    try:
        with open(f"{directory}/probe", "w"):
            pass
    except OSError:
        return False
    os.unlink(f"{directory}/probe")
    return True


def picture() -> str:
    """A soft gradient as a PNG in base64."""
    file = io.BytesIO()
    Image.linear_gradient("L").convert("RGB").save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def main() -> None:
    assert os.getuid() != 0, "the image runs as root"
    assert not writable("/app"), "the root is writable"
    assert writable("/tmp"), "/tmp is not writable"
    found = [tool for tool in TOOLS if shutil.which(tool)]
    assert not found, f"build tools were left in the image: {found}"

    seconds = wait()
    labels = ["fog", "sunset", "keyboard"]
    answer = ask("/v1/classify", {"image": picture(), "candidate_labels": labels})
    assert {one["label"] for one in answer["labels"]} == set(labels), answer
    assert abs(sum(one["score"] for one in answer["labels"]) - 1) < 1e-3, answer
    spent = answer["defense"]
    assert spent["method"] == "tapt", answer
    assert spent["steps"] >= 1, answer
    refused = 200
    try:
        ask("/v1/classify", {"image": picture(), "candidate_labels": ["alone"]})
    except urllib.error.HTTPError as error:
        refused = error.code
    assert refused == 422, "one label was taken for enough"
    assert "tapt_requests_total" in ask("/metrics")
    device = ask("/info")["model"]["device"]
    print(
        f"ready after {seconds:.1f} s; {answer['model']} on {device} says "
        f"{answer['labels'][0]['label']} after {spent['steps']} step(s), "
        f"{answer['timings_ms']['total']:.0f} ms"
    )


main()
