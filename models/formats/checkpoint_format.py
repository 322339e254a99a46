"""What the formats of checkpoints have in common."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from transformers import CLIPConfig, CLIPModel

from models.errors import LoadError
from models.file_schemas import Model, check, read_json
from models.images.preprocess import Preprocessing


@dataclass(frozen=True, slots=True)
class Architecture:
    """What a checkpoint's configuration says, in the terms of transformers' CLIP."""

    config: CLIPConfig
    preprocessing: Preprocessing


class CheckpointFormat(Protocol):
    """How a CLIP is laid out in a directory. Each format is a module with these names.

    Attributes:
        CONFIG: name of the file that describes the model.
        WEIGHTS: glob of the safetensors files with the weights.
        PICKLED: glob of pickled weights. They are only read by `tapt-serve convert`.
    """

    CONFIG: str
    WEIGHTS: str
    PICKLED: str

    def recognizes(self, directory: Path) -> bool:
        """Whether the directory's configuration is of this format. Raises nothing."""

    def read_architecture(self, directory: Path, files: Sequence[Path], name: str) -> Architecture:
        """Read and check the configuration; `files` are the weights.

        Raises:
            LoadError: it is damaged, or asks for what a `CLIPModel` does not have.
        """

    def load_model(self, config: CLIPConfig, files: Sequence[Path], name: str) -> CLIPModel:
        """The model in float32, with the weights of `files`. Code in a pickled file is not run.

        Raises:
            LoadError: weights are missing or of other shapes.
            Exception: whatever transformers or safetensors raise for damaged files.
        """


def read_config(path: Path, name: str) -> dict[str, Any]:
    """The object in a JSON file of the checkpoint `name`. Raises LoadError."""
    try:
        return read_json(path)
    except OSError as error:
        raise LoadError(f"{name} has no readable {path.name}") from error
    except ValueError as error:
        raise LoadError(f"{name}: {error}") from error


def check_config(schema: type[Model], values: dict[str, Any], name: str, file: str) -> Model:
    """As `file_schemas.check`. Raises LoadError."""
    try:
        return check(schema, values, file)
    except ValueError as error:
        raise LoadError(f"{name}: {error}") from None


def check_report(report: dict[str, Any], name: str) -> None:
    """Refuse a model that was not given all of its weights.

    Args:
        report: the loading info of transformers' `from_pretrained`.

    Raises:
        LoadError: naming one of the weights.
    """
    missing = sorted(report["missing_keys"])
    missing += sorted(str(key) for key, *_ in report["mismatched_keys"])
    if missing:
        raise LoadError(
            f"{name} lacks weights that its config names, or has them in another shape: "
            f"{missing[0]}"
        )
