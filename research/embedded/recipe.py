"""What a run of the embedded model depends on but its data and its time: shapes, rates, shares."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from transformers import CLIPConfig, CLIPModel


@dataclass(frozen=True)
class Recipe:
    """Shapes of the two towers and everything that is tuned.

    `lesson` is the share of the run that the text tower learns in, alone; the image tower has the
    rest. `resolutions` lists (share of that rest from which it holds, pixels a side); `rate` is
    Muon's, AdamW takes a third of it; `mixing` is the probability that a batch is mixed; `jitter`
    the largest relative change of brightness, contrast and saturation, `gray` the probability
    that an image loses its colors, `drop` that the last block is skipped (stochastic depth);
    `noun_scale` the inverse temperature at which published nouns are ranked.
    """

    width: int = 192
    layers: int = 6
    heads: int = 3
    text_width: int = 192
    text_layers: int = 4
    context: int = 64
    vocabulary: int = 8192
    projection: int = 512
    size: int = 64
    patch: int = 8
    lesson: float = 0.15
    lesson_batch: int = 1024
    resolutions: tuple[tuple[float, int], ...] = ((0.0, 32), (0.4, 48), (0.7, 64))
    batch: int = 512
    rate: float = 3e-3
    decay: float = 0.1
    warmup: float = 0.03
    average: float = 0.995
    smoothing: float = 0.1
    mixing: float = 0.2
    jitter: float = 0.3
    gray: float = 0.05
    drop: float = 0.05
    noun_weight: float = 0.5
    noun_scale: float = 15.0
    seed: int = 0

    def phase_at(self, progress: float) -> tuple[bool, float]:
        """Whether the words are still being learned, and the share done of what is."""
        if progress < self.lesson:
            return True, progress / self.lesson
        return False, (progress - self.lesson) / (1 - self.lesson)

    def rate_at(self, progress: float) -> float:
        """Share of the full rate in a phase: linear warm-up, then a cosine to zero."""
        if progress < self.warmup:
            return progress / self.warmup
        return 0.5 * (
            1 + math.cos(math.pi * min(1.0, (progress - self.warmup) / (1 - self.warmup)))
        )

    def size_at(self, progress: float) -> int:
        """Pixels a side at this share of the images' phase."""
        return [size for start, size in self.resolutions if progress >= start][-1]


RECIPES = {
    "cpu": Recipe(),
    "gpu": Recipe(width=256, heads=4, layers=8, batch=1024, mixing=0.8, drop=0.1, jitter=0.4),
}


def build_model(recipe: Recipe, tokenizer: Any) -> Any:
    """A fresh CLIPModel of the recipe's shape with the tokenizer's special tokens."""
    torch.manual_seed(recipe.seed)
    shared = {"hidden_act": "gelu", "projection_dim": recipe.projection}
    config = CLIPConfig(
        vision_config={
            **shared,
            "hidden_size": recipe.width,
            "intermediate_size": 4 * recipe.width,
            "num_hidden_layers": recipe.layers,
            "num_attention_heads": recipe.heads,
            "image_size": recipe.size,
            "patch_size": recipe.patch,
        },
        text_config={
            **shared,
            "hidden_size": recipe.text_width,
            "intermediate_size": 4 * recipe.text_width,
            "num_hidden_layers": recipe.text_layers,
            "num_attention_heads": max(1, recipe.text_width // 64),
            "max_position_embeddings": recipe.context,
            "vocab_size": len(tokenizer),
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        projection_dim=recipe.projection,
    )
    return CLIPModel(config)
