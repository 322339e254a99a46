"""Tiny checkpoints in OpenCLIP's layout, written from a `CLIPModel`."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPModel

OUTSIDE = {
    "logit_scale": "logit_scale",
    "visual_projection.weight": "visual.proj",
    "text_projection.weight": "text_projection",
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "vision_model.embeddings.patch_embedding.weight": "visual.conv1.weight",
    "vision_model.pre_layrnorm": "visual.ln_pre",
    "vision_model.post_layernorm": "visual.ln_post",
    "text_model.embeddings.token_embedding": "token_embedding",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm": "ln_final",
    "vision_model.encoder.layers": "visual.transformer.resblocks",
    "text_model.encoder.layers": "transformer.resblocks",
}
INSIDE = {
    ".layer_norm": ".ln_",
    ".self_attn.out_proj": ".attn.out_proj",
    ".mlp.fc1": ".mlp.c_fc",
    ".mlp.fc2": ".mlp.c_proj",
}


def state_dict(model: CLIPModel, custom_text: bool = False) -> dict[str, Tensor]:
    """A model's weights as OpenCLIP names them."""
    found: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        old = next(old for old in OUTSIDE if name.startswith(old))
        new = OUTSIDE[old] + name.removeprefix(old)
        for part, other in INSIDE.items():
            new = new.replace(part, other)
        found[new] = value.T if new in ("visual.proj", "text_projection") else value
    for query in [name for name in found if ".q_proj." in name]:
        parts = [found.pop(query.replace(".q_", f".{letter}_")) for letter in "qkv"]
        fused = query.replace("self_attn.q_proj.", "attn.in_proj_")
        found[fused] = torch.cat(parts)
    found["attn_mask"] = torch.zeros(4, 4)
    if custom_text:
        own = ("visual.", "logit_scale")
        found = {n if n.startswith(own) else f"text.{n}": value for n, value in found.items()}
    return {name: value.contiguous() for name, value in found.items()}


def write(
    directory: Path,
    model: CLIPModel,
    model_cfg: dict[str, Any],
    preprocess_cfg: dict[str, Any] | None = None,
    pickled: bool = False,
) -> Path:
    """A model as a directory of OpenCLIP's, without a tokenizer."""
    directory.mkdir(parents=True, exist_ok=True)
    config = {"model_cfg": model_cfg, "preprocess_cfg": preprocess_cfg or {}}
    (directory / "open_clip_config.json").write_text(json.dumps(config))
    tensors = state_dict(model, model_cfg.get("custom_text", False))
    if pickled:
        torch.save(tensors, directory / "open_clip_pytorch_model.bin")
    else:
        save_file(tensors, directory / "open_clip_model.safetensors")
    return directory
