"""transformers' zero-shot pipeline behind LitServe. Runs in an environment of its own.

python litserve_app.py CHECKPOINT PORT
"""

import base64
import io
import sys
from typing import Any

import litserve
import torch
from PIL import Image
from transformers import pipeline


class ZeroShot(litserve.LitAPI):
    def setup(self, device: str) -> None:
        self.classifier = pipeline(
            "zero-shot-image-classification", model=sys.argv[1], dtype=torch.float32, device=device
        )

    def decode_request(self, request: dict[str, Any]) -> dict[str, Any]:
        image = Image.open(io.BytesIO(base64.b64decode(request.pop("image"))))
        return {"image": image, **request}

    def predict(self, x: dict[str, Any]) -> Any:
        return self.classifier(x.pop("image"), **x)

    def encode_response(self, output: Any) -> Any:
        return {"labels": output}


if __name__ == "__main__":
    server = litserve.LitServer(ZeroShot(), accelerator="cpu")
    server.run(port=int(sys.argv[2]), generate_client_file=False, log_level="warning")
