"""The format of transformers' `save_pretrained`: `config.json` and `model.safetensors`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPConfig, CLIPModel

from models.errors import LoadError
from models.file_schemas import CheckpointConfig, ImageProcessorConfig, read_json
from models.formats.checkpoint_format import (
    OPENAI_MEAN,
    OPENAI_STD,
    Architecture,
    check_config,
    check_report,
    read_config,
)
from models.views import FILTERS, Preprocessing

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
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise LoadError(f"{name} cannot be loaded as a CLIP: {reason}") from error
    return Architecture(config, _read_preprocessing(directory, name, config))


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


def _read_preprocessing(directory: Path, name: str, config: CLIPConfig) -> Preprocessing:
    """The image processor's settings from either file that may hold them; OpenAI's by default."""
    values: dict[str, Any] = {}
    if (directory / "preprocessor_config.json").is_file():
        values = read_config(directory / "preprocessor_config.json", name)
    elif (directory / "processor_config.json").is_file():
        values = read_config(directory / "processor_config.json", name).get("image_processor", {})
    settings = check_config(ImageProcessorConfig, values, name, "the image processor's settings")
    image_size: int = config.vision_config.image_size
    short_side: int | None = image_size
    square = None
    if size := settings.size:
        short_side = size.shortest_edge
        if size.height is not None and size.width is not None:
            square = (size.height, size.width)
    side = (settings.crop_size and settings.crop_size.height) or image_size
    if not settings.do_center_crop and square is not None:
        side = square[0]
    if not settings.do_resize:
        square = short_side = None
    if side != image_size or settings.resample not in FILTERS:
        raise LoadError(
            f"{name}: pictures are cropped to {side} with filter {settings.resample}; "
            f"this model takes {image_size}, and filters {sorted(FILTERS)} are known"
        )
    mean, std = settings.image_mean or OPENAI_MEAN, settings.image_std or OPENAI_STD
    return Preprocessing(
        side,
        short_side,
        square,
        settings.resample,
        (mean[0], mean[1], mean[2]),
        (std[0], std[1], std[2]),
    )
