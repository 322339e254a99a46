"""Loading a CLIP checkpoint: the embedded one, a local directory, or a hub id; safetensors only."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from transformers import AutoTokenizer, CLIPModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from models.clip import PromptedCLIP
from models.file_schemas import CheckpointConfig, ImageProcessorConfig, Model, check, read_json
from models.views import FILTERS, Preprocessing

EMBEDDED = Path(__file__).parent / "embedded"
OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)


class ModelError(ValueError):
    """A checkpoint or bundle that cannot be used, in one sentence for the operator."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A loaded CLIP and what belongs to it; `sha256` is taken over its weight files."""

    name: str
    directory: Path
    clip: PromptedCLIP
    tokenizer: PreTrainedTokenizerBase
    preprocessing: Preprocessing
    sha256: str


def load_checkpoint(
    name: str,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    revision: str = "",
    sha256: str = "",
) -> Checkpoint:
    """Load `embedded`, a directory, or a hub id (from the cache when `HF_HUB_OFFLINE` is set), of
    a hub id the `revision` where one is given. With `sha256`, the weights must have that hash.

    Raises:
        ModelError: missing, not a CLIP, without safetensors weights, damaged, or not the one that
            `sha256` names.
    """
    transformers_logging.disable_progress_bar()
    directory = _locate(name, revision)
    config = _read_json(directory / "config.json", name)
    kind = config.get("model_type")
    if kind != "clip":
        raise ModelError(f"{name} is a {kind or 'unknown'} checkpoint, not a CLIP")
    _check(CheckpointConfig, config, name, "config.json")
    files = sorted(directory.glob("model*.safetensors"))
    if not files:
        raise ModelError(f"{name} holds no safetensors weights; pickled ones are never loaded")
    _check_names(directory, config, files, name)
    found = _hash(files)
    if sha256 and found != sha256:
        raise ModelError(f"{name} has weights of sha256 {found}, and {sha256} is asked for")
    try:
        model, report = CLIPModel.from_pretrained(
            directory,
            dtype=torch.float32,
            use_safetensors=True,
            local_files_only=True,
            attn_implementation="sdpa",
            output_loading_info=True,
        )
    except Exception as error:  # transformers fails with whatever a config makes it trip over
        raise ModelError(f"{name} cannot be loaded as a CLIP: {_first_line(error)}") from error
    if report["missing_keys"] or report["mismatched_keys"]:
        raise ModelError(f"{name} lacks weights that its config names")
    tokenizer = _load_tokenizer(directory, name, model.config.text_config.vocab_size)
    preprocessing = _read_preprocessing(directory, name, model.config.vision_config.image_size)
    scale = model.logit_scale.detach().clone()
    model.to(device, dtype)
    # An exponent: rounded to bfloat16, it would take a hundredth off every logit.
    model.logit_scale = torch.nn.Parameter(scale.to(device))
    clip = PromptedCLIP(model, preprocessing.mean, preprocessing.std)
    # Answers carry the name: of a directory here, only the last part is anybody's business.
    shown = directory.resolve().name if Path(name).is_dir() else name
    return Checkpoint(shown, directory, clip, tokenizer, preprocessing, found)


def _locate(name: str, revision: str) -> Path:
    if name == "embedded" or Path(name).is_dir():
        if revision:
            raise ModelError(f"{name} is here and not on the hub, so it has no revision {revision}")
        return EMBEDDED if name == "embedded" else Path(name)
    patterns = ["*.json", "*.txt", "*.model", "model*.safetensors"]
    try:
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=patterns))
    except HFValidationError as error:
        raise ModelError(f"{name} is neither a directory nor a hub id") from error
    except LocalEntryNotFoundError as error:
        raise ModelError(f"{name} is no directory here, and no hub or cache holds it") from error
    except (HfHubHTTPError, OSError) as error:
        raise ModelError(f"{name} cannot be fetched: {_first_line(error)}") from error


def _check_names(directory: Path, config: dict[str, Any], files: list[Path], name: str) -> None:
    """A config or an index may name any file for the weights; only those hashed may be read.

    Raises:
        ModelError: another is named, which might even be a pickled one.
    """
    named = {str(own)} if (own := config.get("transformers_weights")) else set()
    if (directory / "model.safetensors.index.json").is_file():
        index = _read_json(directory / "model.safetensors.index.json", name)
        shards = index.get("weight_map")
        named |= set(map(str, shards.values())) if isinstance(shards, dict) else {"nothing"}
    if strange := named - {path.name for path in files}:
        raise ModelError(f"{name} names weights that are none: {min(strange)[:64]}")


def _load_tokenizer(directory: Path, name: str, vocabulary: int) -> PreTrainedTokenizerBase:
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            directory, local_files_only=True
        )
        ids = tokenizer("a photo of a dog")["input_ids"]
    except Exception as error:  # a tokenizer's own code may raise anything
        raise ModelError(f"{name} has no usable tokenizer: {_first_line(error)}") from error
    # Where the files are missing, transformers makes up a tokenizer that knows no words.
    if len(set(ids)) < 4 or max(ids) >= vocabulary:
        raise ModelError(f"{name} has no tokenizer that fits its {vocabulary} text embeddings")
    return tokenizer


def _read_preprocessing(directory: Path, name: str, image_size: int) -> Preprocessing:
    """The image processor's settings, by whichever file holds them; OpenAI's where none does."""
    values: dict[str, Any] = {}
    if (directory / "preprocessor_config.json").is_file():
        values = _read_json(directory / "preprocessor_config.json", name)
    elif (directory / "processor_config.json").is_file():
        values = _read_json(directory / "processor_config.json", name).get("image_processor", {})
    config = _check(ImageProcessorConfig, values, name, "the image processor's settings")
    short_side: int | None = image_size
    square = None
    if size := config.size:
        short_side = size.shortest_edge
        if size.height is not None and size.width is not None:
            square = (size.height, size.width)
    side = (config.crop_size and config.crop_size.height) or image_size
    if not config.do_center_crop and square is not None:
        side = square[0]
    if not config.do_resize:
        square = short_side = None
    if side != image_size or config.resample not in FILTERS:
        raise ModelError(
            f"{name}: pictures are cropped to {side} with filter {config.resample}; "
            f"this model takes {image_size}, and filters {sorted(FILTERS)} are known"
        )
    mean, std = config.image_mean or OPENAI_MEAN, config.image_std or OPENAI_STD
    return Preprocessing(
        side,
        short_side,
        square,
        config.resample,
        (mean[0], mean[1], mean[2]),
        (std[0], std[1], std[2]),
    )


def _check(schema: type[Model], values: dict[str, Any], name: str, file: str) -> Model:
    try:
        return check(schema, values, file)
    except ValueError as error:
        raise ModelError(f"{name}: {error}") from None


def _read_json(path: Path, name: str) -> dict[str, Any]:
    try:
        return read_json(path)
    except OSError as error:
        raise ModelError(f"{name} has no readable {path.name}") from error
    except ValueError as error:
        raise ModelError(f"{name}: {error}") from error


def _hash(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
