"""Load a CLIP checkpoint: the embedded one, a local directory, or a hub id; safetensors only."""

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
from models.errors import LoadError
from models.file_schemas import CheckpointConfig, Model, check, read_json
from models.preprocessing import read_preprocessing
from models.views import Preprocessing

EMBEDDED = Path(__file__).parent / "embedded"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A loaded CLIP with its tokenizer and preprocessing.

    `sha256` covers its weight files; `dtype_reason` says why the model computes in its dtype.
    """

    name: str
    directory: Path
    clip: PromptedCLIP
    tokenizer: PreTrainedTokenizerBase
    preprocessing: Preprocessing
    sha256: str
    dtype_reason: str = ""


def load_checkpoint(
    name: str,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    revision: str = "",
    sha256: str = "",
) -> Checkpoint:
    """Load a checkpoint.

    Args:
        name: `embedded`, a directory, or a hub id (from the cache when `HF_HUB_OFFLINE` is set).
        revision: commit, tag or branch of a hub id; empty for the newest.
        sha256: hash that the weight files must have; empty accepts any.

    Raises:
        LoadError: it is missing, not a CLIP, without safetensors weights, damaged, or of another
            hash.
    """
    transformers_logging.disable_progress_bar()
    directory = _locate(name, revision)
    config = _read_json(directory / "config.json", name)
    kind = config.get("model_type")
    if kind != "clip":
        raise LoadError(f"{name} is a {kind or 'unknown'} checkpoint, not a CLIP")
    _check(CheckpointConfig, config, name, "config.json")
    files = sorted(directory.glob("model*.safetensors"))
    if not files:
        raise LoadError(f"{name} holds no safetensors weights; pickled ones are never loaded")
    _check_names(directory, config, files, name)
    found = _hash(files)
    if sha256 and found != sha256:
        raise LoadError(f"{name} has weights of sha256 {found}, and {sha256} is asked for")
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
        raise LoadError(f"{name} cannot be loaded as a CLIP: {_first_line(error)}") from error
    if report["missing_keys"] or report["mismatched_keys"]:
        raise LoadError(f"{name} lacks weights that its config names")
    tokenizer = _load_tokenizer(directory, name, model.config.text_config.vocab_size)
    preprocessing = read_preprocessing(directory, name, model.config.vision_config.image_size)
    scale = model.logit_scale.detach().clone()
    model.to(device, dtype)
    # Rounding this exponent to bfloat16 would change every logit by about 1%.
    model.logit_scale = torch.nn.Parameter(scale.to(device))
    clip = PromptedCLIP(model, preprocessing.mean, preprocessing.std)
    # Answers carry the name: do not disclose where a local directory is.
    shown = directory.resolve().name if Path(name).is_dir() else name
    return Checkpoint(shown, directory, clip, tokenizer, preprocessing, found)


def _locate(name: str, revision: str) -> Path:
    if name == "embedded" or Path(name).is_dir():
        if revision:
            raise LoadError(f"{name} is here and not on the hub, so it has no revision {revision}")
        return EMBEDDED if name == "embedded" else Path(name)
    patterns = ["*.json", "*.txt", "*.model", "model*.safetensors"]
    try:
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=patterns))
    except HFValidationError as error:
        raise LoadError(f"{name} is neither a directory nor a hub id") from error
    except LocalEntryNotFoundError as error:
        raise LoadError(f"{name} is no directory here, and no hub or cache holds it") from error
    except (HfHubHTTPError, OSError) as error:
        raise LoadError(f"{name} cannot be fetched: {_first_line(error)}") from error


def _check_names(directory: Path, config: dict[str, Any], files: list[Path], name: str) -> None:
    """Refuse weight files, named by the config or an index, that are not hashed.

    Raises:
        LoadError: another file is named, which might be a pickled one.
    """
    named = {str(own)} if (own := config.get("transformers_weights")) else set()
    if (directory / "model.safetensors.index.json").is_file():
        index = _read_json(directory / "model.safetensors.index.json", name)
        shards = index.get("weight_map")
        named |= set(map(str, shards.values())) if isinstance(shards, dict) else {"nothing"}
    if strange := named - {path.name for path in files}:
        raise LoadError(f"{name} names weights that are none: {min(strange)[:64]}")


def _load_tokenizer(directory: Path, name: str, vocabulary: int) -> PreTrainedTokenizerBase:
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            directory, local_files_only=True
        )
        ids = tokenizer("a photo of a dog")["input_ids"]
    except Exception as error:  # a tokenizer's own code may raise anything
        raise LoadError(f"{name} has no usable tokenizer: {_first_line(error)}") from error
    # If the files are missing, transformers makes up a tokenizer without any words.
    if len(set(ids)) < 4 or max(ids) >= vocabulary:
        raise LoadError(f"{name} has no tokenizer that fits its {vocabulary} text embeddings")
    return tokenizer


def _check(schema: type[Model], values: dict[str, Any], name: str, file: str) -> Model:
    try:
        return check(schema, values, file)
    except ValueError as error:
        raise LoadError(f"{name}: {error}") from None


def _read_json(path: Path, name: str) -> dict[str, Any]:
    try:
        return read_json(path)
    except OSError as error:
        raise LoadError(f"{name} has no readable {path.name}") from error
    except ValueError as error:
        raise LoadError(f"{name}: {error}") from error


def _hash(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
