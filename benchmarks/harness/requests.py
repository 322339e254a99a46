"""Classification requests: their pictures, their JSON bodies, and their bytes on the wire."""

import base64
import io
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

LABELS = ("cat", "dog", "school bus", "lemon", "espresso", "cliff", "volleyball", "reel", "fog",
          "keyboard")  # fmt: skip


def encode(pixels: NDArray[np.uint8], kind: str = "PNG") -> bytes:
    """A picture [H, W, 3] as a file of this format."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def classification(file: bytes, labels: Sequence[str], **defense: object) -> dict[str, Any]:
    """The JSON body of `POST /v1/classify`."""
    image = base64.b64encode(file).decode()
    return {"image": image, "candidate_labels": list(labels), "defense": defense or None}


def post(path: str, body: bytes, content_type: str = "application/json", key: str = "") -> bytes:
    """A whole HTTP request, to be sent as it is."""
    lines = [
        f"POST {path} HTTP/1.1",
        "Host: load",
        "Connection: close",
        f"Content-Type: {content_type}",
        f"Content-Length: {len(body)}",
        *([f"Authorization: Bearer {key}"] if key else []),
    ]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def post_json(body: object) -> bytes:
    """A whole request to `/v1/classify`."""
    return post("/v1/classify", json.dumps(body).encode())


def draw_file(number: int) -> bytes:
    """A random JPEG of a small photograph's size, 640 x 480 pixels."""
    source = np.random.default_rng(number)
    coarse = Image.fromarray(source.integers(0, 256, (12, 16, 3)).astype(np.uint8))
    file = io.BytesIO()
    coarse.resize((640, 480), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
    return file.getvalue()


def draw_requests(count: int) -> list[bytes]:
    """Whole requests with different random pictures and ten labels."""
    return [post_json(classification(draw_file(number), LABELS)) for number in range(count)]


def photograph() -> dict[str, Any]:
    """The JSON body of a request with a photograph of 451 x 300 pixels and five labels."""
    from skimage import data

    return classification(encode(data.chelsea(), "JPEG"), LABELS[:5])
