"""Zero-shot accuracy of a small CLIP: names through the text tower, pixels through the other."""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from models.data import Dataset
from research.embedded.captions import TEMPLATE

# OpenAI CLIP's own normalization, so that a preprocessor of either model fits the other.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


def fit(image: Image.Image, size: int) -> Image.Image:
    """Resize the short side to `size` (bicubic) and cut the center, as CLIPImageProcessor does."""
    width, height = image.size
    if width <= height:
        shape = (size, int(size * height / width))
    else:
        shape = (int(size * width / height), size)
    resized = image if shape == image.size else image.resize(shape, Image.Resampling.BICUBIC)
    left, top = (shape[0] - size) // 2, (shape[1] - size) // 2
    return resized.crop((left, top, left + size, top + size))


def stack(
    dataset: Dataset, size: int, limit: int | None = None, seed: int | None = None
) -> tuple[Tensor, Tensor]:
    """All images as uint8 [count, 3, size, size] and their labels as int64 [count]."""
    images, labels = [], []
    for example in dataset.examples(limit, seed):
        images.append(np.asarray(fit(Image.fromarray(example.pixels), size)))
        labels.append(example.label)
    stacked = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()
    return stacked, torch.tensor(labels)


def normalize(pixels: Tensor) -> Tensor:
    """Pixels in [0, 1], [batch, 3, height, width], to what the image tower was trained on."""
    shape = (1, 3, 1, 1)
    mean = torch.tensor(MEAN, device=pixels.device).view(shape)
    return (pixels - mean) / torch.tensor(STD, device=pixels.device).view(shape)


def image_features(model: Any, pixels: Tensor) -> Tensor:
    """Unit features [batch, projection] of normalized pixels of any multiple of the patch size."""
    pooled = model.vision_model(pixels, interpolate_pos_encoding=True).pooler_output
    return F.normalize(model.visual_projection(pooled).float(), dim=-1)


def text_features(model: Any, tokenizer: Any, texts: list[str]) -> Tensor:
    """Unit features [texts, projection], cut at the longest text of the batch."""
    encoded = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
    pooled = model.text_model(encoded["input_ids"].to(model.device)).pooler_output
    return F.normalize(model.text_projection(pooled).float(), dim=-1)


@torch.no_grad()
def rank(
    model: Any, tokenizer: Any, images: Tensor, names: list[str], template: str = TEMPLATE
) -> Tensor:
    """Cosine similarities [images, names] of uint8 images [count, 3, size, size]."""
    texts = text_features(model, tokenizer, [template.format(name) for name in names])
    rows = []
    for batch in images.split(250):
        pixels = normalize(batch.to(model.device).float() / 255)
        rows.append(image_features(model, pixels) @ texts.T)
    return torch.cat(rows).float().cpu()


def top1(model: Any, tokenizer: Any, images: Tensor, labels: Tensor, names: list[str]) -> Tensor:
    """Whether each image's best name is its own: bool [count]."""
    return rank(model, tokenizer, images, names).argmax(1) == labels
