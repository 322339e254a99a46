"""The format of transformers' `save_pretrained`: `config.json` and `model.safetensors`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPConfig, CLIPModel

from models.errors import LoadError, first_line
from models.file_schemas import CheckpointConfig, read_json
from models.formats.checkpoint_format import (
    Architecture,
    check_config,
    check_report,
    read_config,
)
from models.preprocessing import read_preprocessing

CONFIG = "config.json"
WEIGHTS = "model*.safetensors"
PICKLED = "pytorch_model*.bin"
INDEX = "model.safetensors.index.json"


def recognizes(directory: Path) -> bool:
    try:
        return read_json(directory / CONFIG).get("model_type") == "clip"
    except (OSError, ValueError):
        return False


def read_architecture(directory: Path, files: Sequence[Path], name: str) -> Architecture:
    values = read_config(directory / CONFIG, name)
    check_config(CheckpointConfig, values, name, CONFIG)
    _check_names(directory, values, files, name)
    try:
        config = CLIPConfig.from_pretrained(directory, local_files_only=True)
    except Exception as error:  # transformers fails with whatever a config makes it trip over
        raise LoadError(f"{name} cannot be loaded as a CLIP: {first_line(error)}") from error
    side: int = config.vision_config.image_size
    return Architecture(config, read_preprocessing(directory, name, side))


def load_model(config: CLIPConfig, files: Sequence[Path], name: str) -> CLIPModel:
    model, report = CLIPModel.from_pretrained(
        files[0].parent,
        config=config,
        dtype=torch.float32,
        use_safetensors=files[0].suffix == ".safetensors",
        weights_only=True,
        local_files_only=True,
        attn_implementation="sdpa",
        output_loading_info=True,
    )
    check_report(report, name)
    return model


def _check_names(directory: Path, values: dict[str, Any], files: Sequence[Path], name: str) -> None:
    """Refuse weight files, named by the config or an index, that are not hashed.

    Raises:
        LoadError: another file is named, which might be a pickled one.
    """
    named = {str(own)} if (own := values.get("transformers_weights")) else set()
    if (directory / INDEX).is_file():
        shards = read_config(directory / INDEX, name).get("weight_map")
        named |= set(map(str, shards.values())) if isinstance(shards, dict) else {"nothing"}
    if strange := named - {path.name for path in files}:
        raise LoadError(f"{name} names weights that are none: {min(strange)[:64]}")
