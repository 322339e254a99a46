"""OpenCLIP: the features and logits that open_clip computes of a checkpoint in its own format.

The text features are those of the `CLIPModel` as loaded; image features and logits come from the
code that serves, which returns text features of unit length only.
"""

from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.parity.figures import Difference, Figures
from models.checkpoint import build_clip, find_checkpoint
from models.clip import PromptedCLIP
from models.labels import one_request


def load(directory: Path) -> PromptedCLIP:
    """The checkpoint in a directory, without a tokenizer. Raises LoadError."""
    return build_clip(find_checkpoint(str(directory)), torch.device("cpu"))


def compare(figures: Figures, clip: PromptedCLIP) -> Iterator[Difference]:
    pixels, ids = figures.given["input.pixels"], figures.given["input.ids"]
    ends = ids.argmax(dim=-1)
    labels = one_request(ids[:, : int(ends.max()) + 1], ends)
    with torch.no_grad():
        images = clip.encode_images(pixels.float()[None])
        pooled = clip.model.text_model(input_ids=ids).pooler_output
        texts = clip.model.text_projection(pooled)
        logits = clip.class_logits(images.features, clip.encode_labels(labels), labels)
    yield figures.difference(images.projected[0], "image_features")
    yield figures.difference(texts, "text_features")
    scale = figures.expected["logit_scale"]
    yield figures.difference(clip.logit_scale.reshape(scale.shape), "logit_scale")
    yield figures.difference(logits[0], "logits")
