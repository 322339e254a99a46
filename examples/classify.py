"""Classify an image with undefended CLIP and with the defense, and print both results.

Usage: classify.py IMAGE LABEL LABEL...
"""

import base64
import json
import os
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

URL = os.environ.get("CLASSIFY_URL", "http://127.0.0.1:8000")
ATTEMPTS = 5


def classify(image: Path, labels: list[str], **defense: Any) -> dict[str, Any]:
    """Send `POST /v1/classify` and return the answer. Retries while the server is busy."""
    body = {
        "image": base64.b64encode(image.read_bytes()).decode(),
        "candidate_labels": labels,
        "defense": defense or None,
    }
    request = urllib.request.Request(
        f"{URL}/v1/classify", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    if key := os.environ.get("CLASSIFY_KEY"):
        request.add_header("Authorization", f"Bearer {key}")
    for attempt in range(1, ATTEMPTS + 1):
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            wait = error.headers.get("Retry-After")
            if wait is None or attempt == ATTEMPTS:
                sys.exit(json.load(error)["error"])
            time.sleep(int(wait))
    raise AssertionError("unreachable")


def main() -> None:
    image, *labels = sys.argv[1:]
    for name, answer in (
        ("undefended", classify(Path(image), labels, method="plain")),
        ("defended", classify(Path(image), labels)),
    ):
        best = answer["labels"][0]
        print(f"{name:10}  {best['label']}  {best['score']:.3f}")


if __name__ == "__main__":
    main()
