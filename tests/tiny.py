"""Tiny CLIP checkpoints with random weights, made on the spot."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import CLIPConfig, CLIPModel

from models.bundle import DefenseBundle
from models.checkpoint import Checkpoint, load_checkpoint
from models.classifier import ImageQuery
from models.prompts import DefensePrompts
from models.statistics import TokenStatistics
from research.embedded.tokenizer import train_tokenizer

LABELS = ("cat", "dog", "school bus", "a red sports car", "lemon", "cliff", "volleyball", "reel")
CPU = torch.device("cpu")


class Payload:
    """A pickle of it holds code: unpickled, it leaves a file behind."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


def save_checkpoint(
    directory: Path,
    *,
    image_size: int = 32,
    patch: int = 8,
    width: int = 64,
    layers: int = 3,
    act: str = "quick_gelu",
    legacy_eos: bool = False,
    context: int = 32,
    seed: int = 0,
) -> Path:
    """A CLIP of the given shape, with a tokenizer of its own and an image processor's settings."""
    tokenizer = train_tokenizer([f"a photo of a {label}." for label in LABELS], 700, context)
    end = tokenizer.eos_token_id
    shape = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": layers}
    common: dict[str, Any] = {**shape, "num_attention_heads": 2, "hidden_act": act}
    config = CLIPConfig(
        projection_dim=48,
        vision_config={**common, "image_size": image_size, "patch_size": patch},
        text_config={
            **common,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": context,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": 2 if legacy_eos else end,
            "pad_token_id": tokenizer.pad_token_id,
        },
    )
    torch.manual_seed(seed)
    model = CLIPModel(config).eval()
    # As initialized all pictures and all labels look alike; spread them, so that errors show.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    (directory / "preprocessor_config.json").write_text(
        json.dumps(
            {
                "size": {"shortest_edge": image_size},
                "crop_size": {"height": image_size, "width": image_size},
                "resample": 3,
                "image_mean": [0.48145466, 0.4578275, 0.40821073],
                "image_std": [0.26862954, 0.26130258, 0.27577711],
            }
        )
    )
    return directory


def load(directory: Path) -> Checkpoint:
    return load_checkpoint(str(directory), CPU)


def make_bundle(checkpoint: Checkpoint, design: str = "vli", seed: int = 1) -> DefenseBundle:
    """Random prompts and statistics of the right shapes for a checkpoint."""
    clip, depth, tokens = checkpoint.clip, 2, 2
    source = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=source) * 0.5

    vision = {"vision": random(1, depth, tokens, clip.vision_width)}
    text = {"text": random(1, depth, tokens, clip.text_width)}
    projection = {
        "projection.weight": random(1, depth, clip.vision_width, clip.text_width) * 0.1,
        "projection.bias": random(1, depth, clip.vision_width),
    }
    tensors = {"v": vision, "vli": vision | text, "vlj": text | projection}[design]
    moments = [
        random(clip.vision_layers, 1 + clip.patches + tokens, clip.vision_width) for _ in range(4)
    ]
    return DefenseBundle(
        prompts=DefensePrompts(design, tensors),
        statistics=TokenStatistics(moments[0], moments[1].abs(), moments[2], moments[3].abs()),
        template="a photo of a {}.",
        layers=depth,
        checkpoint_sha256=checkpoint.sha256,
        suspicion={"learned": 0.5, "none": 0.5},
        false_positive_rate=0.05,
        provenance={"made": "at random, for a test"},
    )


def draw_image(seed: int, height: int = 48, width: int = 56) -> NDArray[np.uint8]:
    """A smooth random picture, different for each seed."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 7, 3)).astype(np.uint8)
    return np.kron(coarse, np.ones((height // 6, width // 7, 1), np.uint8))


def make_queries(count: int) -> list[ImageQuery]:
    """Queries with different images, sizes, label sets (of 2 to 8 labels), readouts and seeds."""
    readouts = ["single", "kept", "all", "weighted"]
    return [
        ImageQuery(
            draw_image(i, 48 + 6 * (i % 3)), LABELS[: 2 + i % 7], None, readouts[i % 4], 100 + i
        )
        for i in range(count)
    ]


def run_twice(module: str, arguments: list[str]) -> None:
    """Run a module in two processes that torchrun joins."""
    two = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*two, "-m", module, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
