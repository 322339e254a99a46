"""Load a CLIP checkpoint: one of the package, a directory, or a hub id; safetensors only."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import CLIPConfig, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from models.clip import PromptedCLIP
from models.errors import LoadError, first_line
from models.formats import FORMATS
from models.formats.checkpoint_format import CheckpointFormat, read_config
from models.hub import find_directory
from models.images.preprocess import Preprocessing
from models.precision import Dtype, choose_precision, compare_precisions
from models.shipped import SHIPPED
from models.tokenizer import load_tokenizer

SMALL_FILES = ("*.json", "*.txt", "*.model", "bundle/bundle.safetensors")


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


@dataclass(frozen=True, slots=True)
class CheckpointSource:
    """A checkpoint that was found and checked, and not loaded yet.

    Attributes:
        files: the weights, which `sha256` covers.
    """

    name: str
    directory: Path
    format: CheckpointFormat
    files: tuple[Path, ...]
    sha256: str
    config: CLIPConfig
    preprocessing: Preprocessing


def load_checkpoint(
    name: str,
    device: torch.device,
    dtype: Dtype = "float32",
    revision: str = "",
    sha256: str = "",
    tokenizer: str = "",
    quick_gelu: bool | None = None,
) -> Checkpoint:
    """Load a checkpoint.

    Args:
        name: `embedded`, `embedded-hardened`, a directory, or a hub id (from the cache when
            `HF_HUB_OFFLINE` is set).
        dtype: see `choose_precision`.
        revision: commit, tag or branch of a hub id; empty for the newest.
        sha256: hash that the weight files must have; empty accepts any.
        tokenizer: a directory, `owner/name` or `owner/name@revision` with the tokenizer; empty for
            the checkpoint's own.
        quick_gelu: compute CLIP's approximate GELU (true) or the exact one (false); None follows
            the checkpoint's configuration.

    Raises:
        LoadError: it is missing, not a CLIP, without safetensors weights or a tokenizer, damaged,
            or of another hash.
    """
    source = find_checkpoint(name, revision, quick_gelu)
    if sha256 and source.sha256 != sha256:
        raise LoadError(f"{name} has weights of sha256 {source.sha256}, and {sha256} is asked for")
    precision = choose_precision(dtype, device, source.config.vision_config.hidden_size)
    clip = build_clip(source, device, precision.dtype)
    if precision.tentative:
        precision = compare_precisions(clip)
        clip.convert(precision.dtype)
    text = source.config.text_config
    found = load_tokenizer(name, source.directory, text.vocab_size, text.eos_token_id, tokenizer)
    # Answers carry the name: do not disclose where a local directory is.
    shown = source.directory.resolve().name if Path(name).is_dir() else name
    return Checkpoint(
        shown,
        source.directory,
        clip,
        found,
        source.preprocessing,
        source.sha256,
        precision.reason,
    )


def find_checkpoint(
    name: str, revision: str = "", quick_gelu: bool | None = None, pickled: bool = False
) -> CheckpointSource:
    """Find a checkpoint and check its configuration; see `load_checkpoint`.

    Args:
        pickled: if there are no safetensors weights, take pickled ones.

    Raises:
        LoadError
    """
    if name in SHIPPED and revision:
        raise LoadError(f"{name} is part of the package and has no revision {revision}")
    place = str(SHIPPED.get(name, name))
    directory = find_directory(place, revision, SMALL_FILES)
    layout, files = _find_weights(place, directory, name, pickled)
    architecture = layout.read_architecture(directory, files, name)
    config = architecture.config
    if quick_gelu is not None:
        for tower in (config.vision_config, config.text_config):
            tower.hidden_act = "quick_gelu" if quick_gelu else "gelu"
    return CheckpointSource(
        name, directory, layout, files, _hash(files), config, architecture.preprocessing
    )


def build_clip(
    source: CheckpointSource, device: torch.device, dtype: torch.dtype = torch.float32
) -> PromptedCLIP:
    """Load the weights. Raises LoadError if they are damaged or do not fit the configuration."""
    transformers_logging.disable_progress_bar()
    try:
        model = source.format.load_model(source.config, source.files, source.name)
    except LoadError:
        raise
    except Exception as error:  # transformers fails with whatever a config makes it trip over
        raise LoadError(f"{source.name} cannot be loaded as a CLIP: {first_line(error)}") from error
    scale = model.logit_scale.detach().clone()
    model.to(device, dtype)
    # Rounding this exponent to bfloat16 would change every logit by about 1%.
    model.logit_scale = torch.nn.Parameter(scale.to(device))
    return PromptedCLIP(model, source.preprocessing.mean, source.preprocessing.std)


def _find_weights(
    place: str, directory: Path, name: str, pickled: bool
) -> tuple[CheckpointFormat, tuple[Path, ...]]:
    """The first format that the directory is of and has weights in, and these.

    Raises:
        LoadError: there is none.
    """
    recognized = [layout for layout in FORMATS if layout.recognizes(directory)]
    if not recognized:
        raise LoadError(_describe_unknown(directory, name))
    for pattern in ("WEIGHTS", "PICKLED")[: 1 + pickled]:
        for layout in recognized:
            glob: str = getattr(layout, pattern)
            if not Path(place).is_dir():
                # The same commit as before, whatever its branch now is at.
                find_directory(place, directory.name, (glob,))
            if files := tuple(sorted(directory.glob(glob))):
                return layout, files
    wanted = " or ".join(layout.WEIGHTS for layout in recognized)
    raise LoadError(
        f"{name} holds no safetensors weights ({wanted}); pickled ones are never loaded, but "
        "`tapt-serve convert` makes a safetensors checkpoint of them"
    )


def _describe_unknown(directory: Path, name: str) -> str:
    """Why a directory is of no format, in one sentence."""
    if not (directory / "config.json").is_file():
        names = " or ".join(layout.CONFIG for layout in FORMATS)
        return f"{name} has no readable {names}, so it is no checkpoint of a known format"
    kind = read_config(directory / "config.json", name).get("model_type")
    return f"{name} is a {kind or 'unknown'} checkpoint, not a CLIP"


def _hash(files: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
