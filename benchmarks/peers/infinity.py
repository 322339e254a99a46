"""infinity-emb, which answers with the embedding of a picture.

Its client would embed the labels once and compare by itself. Neither is measured, which favors it.
"""

import base64
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from numpy.typing import NDArray

from benchmarks.harness.requests import LABELS
from benchmarks.peers.peer import TEMPLATE, Model, Peer


class Infinity(Peer):
    name = "infinity"
    title = "infinity-emb, image embedding only"
    # Without its extra `vision`: that brings torchvision, whose wheel does not fit every torch.
    requirements = ("infinity-emb[server,torch]==0.0.78", "torch", "pillow", "aiohttp")
    packages = ("infinity-emb", "transformers", "torch")
    path = "/embeddings"

    def command(self, python: Path, model: Model, port: int) -> list[str]:
        program = str(python.parent / "infinity_emb")
        # Its first line names the folder that it was installed in, which may have moved.
        return [str(python), program, "v2",
                "--model-id", str(model.directory), "--served-model-name", "clip",
                "--engine", "torch", "--device", "cpu", "--dtype", "float32",
                "--host", "127.0.0.1", "--port", str(port)]  # fmt: skip

    def body(self, file: bytes) -> dict[str, Any]:
        image = f"data:image/jpeg;base64,{base64.b64encode(file).decode()}"
        return {"model": "clip", "modality": "image", "encoding_format": "base64", "input": [image]}

    def label(self, answer: Any, http: httpx.Client) -> str:
        texts = [TEMPLATE.format(label) for label in LABELS]
        asked = {"model": "clip", "encoding_format": "base64", "input": texts}
        labels = _embeddings(http.post(self.path, json=asked).raise_for_status().json())
        return LABELS[int((labels @ _embeddings(answer)[0]).argmax())]


def _embeddings(answer: Any) -> NDArray[np.float32]:
    """Unit vectors [N, D]."""
    rows = [base64.b64decode(one["embedding"]) for one in answer["data"]]
    found = np.stack([np.frombuffer(row, np.float32) for row in rows])
    unit: NDArray[np.float32] = found / np.linalg.norm(found, axis=1, keepdims=True)
    return unit
