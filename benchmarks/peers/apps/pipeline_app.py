"""transformers' zero-shot pipeline behind FastAPI. Runs in an environment of its own.

python pipeline_app.py CHECKPOINT PORT
"""

import base64
import io
import sys
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI
from PIL import Image
from pydantic import BaseModel
from transformers import pipeline


class Classification(BaseModel):
    image: str  # base64
    candidate_labels: list[str]
    hypothesis_template: str


app = FastAPI()
classifier = pipeline("zero-shot-image-classification", model=sys.argv[1], dtype=torch.float32)


@app.post("/classify")
def classify(asked: Classification) -> Any:  # FastAPI runs it in its thread pool
    image = Image.open(io.BytesIO(base64.b64decode(asked.image)))
    return classifier(
        image,
        candidate_labels=asked.candidate_labels,
        hypothesis_template=asked.hypothesis_template,
    )


if __name__ == "__main__":
    uvicorn.run(app, port=int(sys.argv[2]), log_level="warning")
