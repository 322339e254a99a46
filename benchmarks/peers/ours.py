"""tapt-serve with one of its methods."""

from pathlib import Path
from typing import Any

import httpx

from benchmarks.harness.requests import LABELS, classification
from benchmarks.peers.peer import Model, Peer


class Ours(Peer):
    packages = ("transformers", "torch")
    path = "/v1/classify"

    def __init__(self, method: str) -> None:
        self.name = method
        self.title = f"tapt-serve, `{method}`"
        self.defended = method != "plain"

    def command(self, python: Path, model: Model, port: int) -> list[str]:
        return [str(python), "-m", "service.cli", "serve", "--model", str(model.directory),
                "--bundle", str(model.bundle), "--dtype", "float32", "--method", self.name,
                "--port", str(port)]  # fmt: skip

    def body(self, file: bytes) -> dict[str, Any]:
        return classification(file, LABELS)

    def label(self, answer: Any, http: httpx.Client) -> str:
        return str(answer["labels"][0]["label"])
