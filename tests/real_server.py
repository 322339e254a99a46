"""The whole service as a user starts it, with the default model, and a photograph to send it."""

import sys
from pathlib import Path

import httpx
from skimage import data

from benchmarks.harness.requests import classification, encode
from benchmarks.harness.server import Server

COMMAND = Path(sys.executable).with_name("tapt-serve")
COFFEE = encode(data.coffee())
LABELS = ["espresso", "school bus", "volleyball", "lemon", "dog"]


class RealServer(Server):
    """`tapt-serve serve` with these flags. As a context manager it is killed on exit."""

    def __init__(self, *flags: str) -> None:
        super().__init__(*flags, command=(str(COMMAND), "serve"))

    def classify(self, **defense: object) -> httpx.Response:
        """Send the photograph."""
        return self.http.post("/v1/classify", json=classification(COFFEE, LABELS, **defense))

    def __exit__(self, *_: object) -> None:
        self.kill()
