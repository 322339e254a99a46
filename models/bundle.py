"""A defense bundle on disk: learned prompts, the token statistics taken with them, thresholds.

A directory with `bundle.json` and `bundle.safetensors`. It holds the sha256 of the checkpoint that
it was learned on and of the prompts that its statistics belong to. Loading checks both.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from models.clip import PromptedCLIP
from models.errors import LoadError
from models.file_schemas import BundleMetadata, check, read_json
from models.hub import find_directory, split_revision
from models.prompts import DefensePrompts
from models.statistics import TokenStatistics

FORMAT = 2
JSON, TENSORS = "bundle.json", "bundle.safetensors"
FOLDER = "bundle"
"""Of a checkpoint's directory or repository, which holds its bundle."""


@dataclass(frozen=True, slots=True)
class DefenseBundle:
    """What is learned beforehand and shared by all requests.

    Attributes:
        template: the text behind the prompt slots that the prompts were learned with.
        layers: the L of the alignment.
        suspicion: thresholds above which an answer counts as suspected, by the prompts that its
            views were read with (`learned` or `none`).
        false_positive_rate: share of clean images above the thresholds.
        provenance: how the bundle was made, JSON types only.
    """

    prompts: DefensePrompts
    statistics: TokenStatistics | None
    template: str
    layers: int
    checkpoint_sha256: str
    suspicion: Mapping[str, float] = field(default_factory=dict)
    false_positive_rate: float | None = None
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def prompts_sha256(self) -> str:
        digest = hashlib.sha256(self.prompts.design.encode())
        for name, value in sorted(self.prompts.tensors.items()):
            array = value.detach().float().cpu().contiguous()
            digest.update(f"{name}{list(array.shape)}".encode())
            digest.update(array.numpy().tobytes())
        return digest.hexdigest()

    def describe(self) -> dict[str, Any]:
        """All but the tensors, in JSON types."""
        return {
            "design": self.prompts.design,
            "template": self.template,
            "layers": self.layers,
            "statistics": self.statistics is not None,
            "checkpoint_sha256": self.checkpoint_sha256,
            "prompts_sha256": self.prompts_sha256,
            "suspicion": dict(self.suspicion),
            "false_positive_rate": self.false_positive_rate,
            "provenance": self.provenance,
        }

    def save(self, directory: Path) -> None:
        """Write the bundle atomically: a reader finds all of it or nothing."""
        meta = {"format": FORMAT, **self.describe()}
        tensors = {f"prompts.{k}": v for k, v in self.prompts.tensors.items()}
        if self.statistics is not None:
            tensors |= {f"statistics.{k}": v for k, v in self.statistics.tensors().items()}
        directory.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory.parent) as scratch:
            fresh, stale = Path(scratch) / "new", Path(scratch) / "old"
            fresh.mkdir()
            save_file({k: v.contiguous().cpu() for k, v in tensors.items()}, fresh / TENSORS)
            (fresh / TENSORS).chmod(0o644)  # safetensors makes it private
            (fresh / JSON).write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
            if directory.exists():
                os.replace(directory, stale)
            os.replace(fresh, directory)


def read_bundle(directory: Path) -> DefenseBundle:
    """Read a bundle, whatever its checkpoint, to the CPU.

    Raises:
        LoadError: it is incomplete or damaged, or its statistics were taken with other prompts.
    """
    try:
        values = read_json(directory / JSON)
        if values.get("format") != FORMAT:
            raise LoadError(f"{directory} is not a defense bundle of format {FORMAT}")
        meta = check(BundleMetadata, values, JSON)
        tensors = load_file(directory / TENSORS)
    except LoadError:
        raise
    except (OSError, ValueError, SafetensorError) as error:
        raise LoadError(f"{directory} is not a complete defense bundle: {error}") from error
    groups: dict[str, dict[str, torch.Tensor]] = {"prompts": {}, "statistics": {}}
    try:
        for name, value in tensors.items():
            group, _, key = name.partition(".")
            # Copy to aligned memory: how a matrix product rounds depends on it.
            groups[group][key] = value.clone()
        statistics = groups["statistics"]
        bundle = DefenseBundle(
            DefensePrompts(meta.design, groups["prompts"]),
            TokenStatistics(**statistics) if statistics else None,
            meta.template,
            meta.layers,
            meta.checkpoint_sha256,
            {str(name): value for name, value in meta.suspicion.items()},
            meta.false_positive_rate,
            meta.provenance,
        )
        _check_tensors(bundle)
    except (KeyError, TypeError, ValueError) as error:
        raise LoadError(f"{directory} is not a complete defense bundle: {error}") from error
    if meta.prompts_sha256 != bundle.prompts_sha256:
        raise LoadError(
            f"the statistics of {directory} belong to prompts {meta.prompts_sha256}, "
            f"the prompts are {bundle.prompts_sha256}"
        )
    return bundle


def load_bundle(directory: Path, clip: PromptedCLIP, checkpoint_sha256: str) -> DefenseBundle:
    """Read a bundle for a loaded checkpoint, its tensors on that checkpoint's device.

    Raises:
        LoadError: see `read_bundle`; or it is of another checkpoint.
    """
    bundle = read_bundle(directory)
    if bundle.checkpoint_sha256 != checkpoint_sha256:
        raise LoadError(
            f"the bundle {directory} was learned on checkpoint {bundle.checkpoint_sha256}, "
            f"the model is {checkpoint_sha256}"
        )
    try:
        _check_sizes(bundle, clip)
    except ValueError as error:
        raise LoadError(f"{directory} is not a complete defense bundle: {error}") from error
    _check_shapes(bundle, clip, directory)
    statistics = bundle.statistics
    return replace(
        bundle,
        prompts=bundle.prompts.to(clip.device),
        statistics=None if statistics is None else statistics.to(clip.device),
    )


def find_bundle(name: str) -> Path:
    """The directory of a bundle: a local one, or that of `owner/name` or `owner/name@revision` on
    the hub, where the bundle lies in `bundle` or at the top.

    Raises:
        LoadError: it cannot be fetched.
    """
    place, revision = split_revision(name)
    if Path(name).is_dir() or place.count("/") != 1:  # no hub id; reading names what is missing
        return Path(name)
    files = [prefix + file for prefix in ("", f"{FOLDER}/") for file in (JSON, TENSORS)]
    directory = find_directory(place, revision, files)
    inside = directory / FOLDER
    return inside if (inside / JSON).is_file() else directory


def _check_tensors(bundle: DefenseBundle) -> None:
    """Raises ValueError unless the tensors can be what their names say, whatever the model."""
    tensors = {f"prompts.{name}": value for name, value in bundle.prompts.tensors.items()}
    if bundle.statistics is not None:
        moments = bundle.statistics.tensors()
        tensors |= {f"statistics.{name}": value for name, value in moments.items()}
        if len({value.shape for value in moments.values()}) > 1:
            raise ValueError("the statistics have different shapes")
        if any((moments[name] < 0).any() for name in ("clean_var", "adv_var")):
            raise ValueError("a variance is negative")
        if not bundle.layers:
            raise ValueError("there are statistics, but no layers to compare with them")
    for name, value in tensors.items():
        dimensions = 3 if name.startswith("statistics.") or name.endswith(".bias") else 4
        if not value.is_floating_point() or value.dim() != dimensions or not value.numel():
            raise ValueError(f"{name} is of type {value.dtype} and shape {list(value.shape)}")
        if not value.isfinite().all():
            raise ValueError(f"{name} holds a value that is not finite")


def _check_sizes(bundle: DefenseBundle, clip: PromptedCLIP) -> None:
    """Raises ValueError if the prompts are more than the model has places for."""
    text, vision = bundle.prompts.text, bundle.prompts.vision
    if text is not None and text.shape[2] + 3 > clip.context_length:
        raise ValueError(f"{text.shape[2]} text prompts leave no room for a label")
    for prompts, layers in ((text, clip.text_layers), (vision, clip.vision_layers)):
        if prompts is not None and prompts.shape[1] > layers:
            raise ValueError(f"prompts for {prompts.shape[1]} layers, and the model has {layers}")


def _check_shapes(bundle: DefenseBundle, clip: PromptedCLIP, directory: Path) -> None:
    """Refuse tensors of the wrong shapes, whose hashes may still be right."""
    vision, text, statistics = bundle.prompts.vision, bundle.prompts.text, bundle.statistics
    tokens = 1 + clip.patches + (0 if vision is None else vision.shape[2])
    fits = (
        (vision is None or (vision.shape[3] == clip.vision_width and len(vision) == 1))
        and (text is None or (text.shape[3] == clip.text_width and len(text) == 1))
        and (statistics is None or statistics.clean_mean.shape[1:] == (tokens, clip.vision_width))
        and (statistics is None or bundle.layers <= len(statistics.clean_mean) + 1)
    )
    if not fits:
        raise LoadError(f"the shapes in the bundle {directory} do not fit the model")
