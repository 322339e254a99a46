"""transformers' zero-shot pipeline behind FastAPI."""

from pathlib import Path
from typing import Any

import httpx

from benchmarks.peers.peer import APPS, Model, Peer


class Pipeline(Peer):
    name = "pipeline"
    title = "transformers' pipeline behind FastAPI"
    requirements = ("transformers>=5,<6", "torch", "fastapi", "uvicorn", "pillow")
    packages = ("transformers", "fastapi", "torch")

    def command(self, python: Path, model: Model, port: int) -> list[str]:
        return [str(python), str(APPS / "pipeline_app.py"), str(model.directory), str(port)]

    def label(self, answer: Any, http: httpx.Client) -> str:
        return str(answer[0]["label"])
