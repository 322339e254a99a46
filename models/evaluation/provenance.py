"""What is recorded beside every figure: settings, machine and command."""

import hashlib
import json
import os
import platform
import shlex
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from models.bundle import DefenseBundle
from models.checkpoint import Checkpoint
from models.classifier import DefendedClassifier
from models.evaluation.machine import cpu_name
from models.evaluation.trial import Protocol

PACKAGES = ("tapt-serve", "torch", "transformers", "numpy", "pyautoattack")


def describe_settings(
    classifier: DefendedClassifier, names: Sequence[str], protocol: Protocol
) -> dict[str, Any]:
    """Everything that an outcome depends on, except image, row and attack."""
    checkpoint, objective = classifier.checkpoint, classifier.objective
    return {
        "version": _version("tapt-serve"),
        "code_sha256": _hash_code(),
        "device": checkpoint.clip.device.type,
        "checkpoint_sha256": checkpoint.sha256,
        "bundle": classifier.bundle and _describe_bundle(classifier.bundle),
        "dtype": str(checkpoint.clip.dtype),
        "labels": list(names),
        "tokens_sha256": _hash_tokens(checkpoint, names),
        "template": classifier.template,
        "defense": {
            "views": protocol.views,
            "view_area": checkpoint.preprocessing.area,
            "steps": protocol.steps,
            "readout": protocol.readout,
            "selection_ratio": classifier.selection_ratio,
            "learning_rate": objective.learning_rate,
            "alignment_weight": objective.alignment_weight,
            "gamma": objective.gamma,
            "adapts": objective.adapts,
            "entropy_of_mean": objective.of_mean,
        },
        "attack": {k: v for k, v in asdict(protocol.budget).items() if k != "epsilon"},
        "answers": protocol.answers,
        "seed": protocol.seed,
    }


def describe_machine(classifier: DefendedClassifier) -> dict[str, Any]:
    """The machine and versions that times were measured with."""
    device = classifier.checkpoint.clip.device
    return {
        "device": str(device),
        "accelerator": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
    }


def tell_command(arguments: Sequence[str], out: Path) -> str:
    """The command for publication, without local paths."""
    shown = [
        "OUT" if part == str(out) else Path(part).name if Path(part).exists() else part
        for part in arguments
    ]
    return shlex.join(["tapt-serve", "evaluate", *shown])


def _describe_bundle(bundle: DefenseBundle) -> dict[str, Any]:
    digest = hashlib.sha256()
    for name, value in sorted(bundle.statistics.tensors().items() if bundle.statistics else []):
        digest.update(name.encode() + value.float().cpu().contiguous().numpy().tobytes())
    return {**bundle.describe(), "statistics_sha256": digest.hexdigest()}


def _hash_tokens(checkpoint: Checkpoint, names: Sequence[str]) -> str:
    """Tell runs with different tokenizers apart."""
    ids = checkpoint.tokenizer(list(names))["input_ids"]
    return hashlib.sha256(json.dumps(ids).encode()).hexdigest()[:16]


def _hash_code() -> str:
    """Hash the code that outcomes depend on, so that a run does not reuse those of an attack or a
    defense that has changed since. They do not depend on calibration."""
    digest, root = hashlib.sha256(), Path(__file__).parent.parent
    for file in sorted(root.rglob("*.py")):
        if "calibration" not in file.relative_to(root).parts:
            digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
