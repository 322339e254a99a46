"""tapt-serve with one of its methods."""

from pathlib import Path
from typing import Any

import httpx

from benchmarks.harness.requests import LABELS, classification
from benchmarks.peers.peer import Model, Peer


class Ours(Peer):
    packages = ("transformers", "torch")
    path = "/v1/classify"

    def __init__(self, method: str, dtype: str = "auto") -> None:
        chosen = "" if dtype == "auto" else dtype
        self.name = "-".join(filter(None, (method, chosen)))
        self.title = ", ".join(filter(None, ("tapt-serve", f"`{method}`", chosen)))
        self.defended = method != "plain"
        self._method, self._dtype = method, dtype

    def command(self, python: Path, model: Model, port: int) -> list[str]:
        return [str(python), "-m", "service.cli", "serve", "--model", str(model.directory),
                "--bundle", str(model.bundle), "--dtype", self._dtype, "--method", self._method,
                "--port", str(port)]  # fmt: skip

    def body(self, file: bytes) -> dict[str, Any]:
        return classification(file, LABELS)

    def label(self, answer: Any, http: httpx.Client) -> str:
        return str(answer["labels"][0]["label"])

    def precision(self, http: httpx.Client) -> str:
        return str(http.get("/info").raise_for_status().json()["model"]["dtype"])
