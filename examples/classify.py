"""Classify an image with undefended CLIP and with the defense, and print both results.

Usage: classify.py [--url URL] [--key KEY] IMAGE LABEL LABEL...
"""

import argparse
import base64
import os
import sys
import time
from pathlib import Path
from typing import Any

import httpx2

ATTEMPTS = 5


def classify(client: httpx2.Client, image: Path, labels: list[str], **defense: Any) -> Any:
    """Send `POST /v1/classify` and return the answer. Retries while the server is busy."""
    body = {
        "image": base64.b64encode(image.read_bytes()).decode(),
        "candidate_labels": labels,
        "defense": defense or None,
    }
    for attempt in range(1, ATTEMPTS + 1):
        answer = client.post("/v1/classify", json=body)
        if answer.is_success:
            return answer.json()
        wait = answer.headers.get("Retry-After")
        if wait is None or attempt == ATTEMPTS:
            sys.exit(answer.json()["error"])
        time.sleep(int(wait))
    raise AssertionError("unreachable")


def main() -> None:
    env = os.environ
    parser = argparse.ArgumentParser(description="Classify an image with and without the defense.")
    parser.add_argument("--url", default=env.get("CLASSIFY_URL", "http://127.0.0.1:8000"))
    parser.add_argument("--key", default=env.get("TAPT_KEY"))
    parser.add_argument("image", type=Path)
    parser.add_argument("labels", nargs="+")
    options = parser.parse_args()
    headers = {"Authorization": f"Bearer {options.key}"} if options.key else {}
    with httpx2.Client(base_url=options.url, headers=headers, timeout=120) as client:
        for name, defense in (("undefended", {"method": "plain"}), ("defended", {})):
            best = classify(client, options.image, options.labels, **defense)["labels"][0]
            print(f"{name:10}  {best['label']}  {best['score']:.3f}")


if __name__ == "__main__":
    main()
