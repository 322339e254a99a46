"""transformers' zero-shot pipeline behind LitServe."""

from pathlib import Path
from typing import Any

import httpx

from benchmarks.peers.peer import APPS, Model, Peer


class LitServe(Peer):
    name = "litserve"
    title = "LitServe with transformers"
    requirements = ("litserve", "transformers>=5,<6", "torch", "pillow")
    packages = ("litserve", "transformers", "torch")
    path = "/predict"

    def command(self, python: Path, model: Model, port: int) -> list[str]:
        return [str(python), str(APPS / "litserve_app.py"), str(model.directory), str(port)]

    def label(self, answer: Any, http: httpx.Client) -> str:
        return str(answer["labels"][0]["label"])
