"""Write a CLIP as a checkpoint directory that `load_checkpoint` and `from_pretrained` read."""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import CLIPModel, PreTrainedTokenizerBase

from models.images.preprocess import Preprocessing


def write_checkpoint(
    model: CLIPModel,
    tokenizer: PreTrainedTokenizerBase | None,
    preprocessing: Preprocessing,
    out: Path,
    records: Mapping[str, Mapping[str, Any]],
) -> None:
    """Write a complete checkpoint in one move, its weights in the model's dtype. What `out` held
    before is replaced.

    Args:
        records: JSON files to write beside it, by name.
    """
    fresh, old = out.with_name(out.name + ".new"), out.with_name(out.name + ".old")
    for leftover in (fresh, old):
        shutil.rmtree(leftover, ignore_errors=True)
    fresh.mkdir(parents=True)
    model.save_pretrained(fresh)
    for file in fresh.glob("*.safetensors"):
        file.chmod(0o644)  # safetensors makes them private; a container reads them as another user
    if tokenizer is not None:
        # Padding and truncation of the last call would be saved with the vocabulary.
        tokenizer.backend_tokenizer.no_padding()
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.save_pretrained(fresh)
    _write_json(fresh / "preprocessor_config.json", _preprocessor(preprocessing))
    for name, record in records.items():
        _write_json(fresh / name, record)
    if out.exists():
        os.replace(out, old)
    os.replace(fresh, out)
    shutil.rmtree(old, ignore_errors=True)


def stored_dtype(directory: Path) -> torch.dtype:
    """The dtype of a checkpoint's weights; float32 if they have several."""
    found: set[torch.dtype] = set()
    for file in directory.glob("*.safetensors"):
        with safe_open(file, framework="pt") as stored:
            tensors = (stored.get_tensor(name) for name in stored.keys())  # noqa: SIM118
            found |= {tensor.dtype for tensor in tensors if tensor.is_floating_point()}
    return found.pop() if len(found) == 1 else torch.float32


def exact_dtype(model: CLIPModel) -> torch.dtype:
    """The narrowest dtype that holds every weight of a model exactly."""
    weights = [weight.detach() for weight in model.parameters()]
    for dtype in (torch.float16, torch.bfloat16):
        if all(torch.equal(weight.to(dtype).to(weight.dtype), weight) for weight in weights):
            return dtype
    return torch.float32


def _preprocessor(preprocessing: Preprocessing) -> dict[str, Any]:
    """The settings of transformers' `CLIPImageProcessor` that do the same."""
    size: dict[str, int] | None = None
    if preprocessing.short_side is not None:
        size = {"shortest_edge": preprocessing.short_side}
        if preprocessing.long_side is not None:
            size["longest_edge"] = preprocessing.long_side
    elif preprocessing.within is not None:
        size = {"max_height": preprocessing.within[0], "max_width": preprocessing.within[1]}
    elif preprocessing.size is not None:
        size = {"height": preprocessing.size[0], "width": preprocessing.size[1]}
    crop = {"height": preprocessing.crop, "width": preprocessing.crop}
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": size is not None,
        "size": size or {"shortest_edge": preprocessing.crop},
        "resample": preprocessing.resample,
        "do_center_crop": True,
        "crop_size": crop,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(preprocessing.mean),
        "image_std": list(preprocessing.std),
    }


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n")
