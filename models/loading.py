"""Load a defended classifier from plain settings."""

import logging
from dataclasses import replace
from pathlib import Path

from models.bundle import FOLDER, DefenseBundle, find_bundle, load_bundle
from models.checkpoint import Checkpoint, load_checkpoint
from models.classifier import DEFAULT_TEMPLATE, DefendedClassifier
from models.device import pick_device
from models.errors import LoadError
from models.images.preprocess import AREA
from models.label_encoder import Template
from models.precision import Dtype
from models.shipped import DEFAULT_MODEL
from models.tapt import Adapts, Objective

log = logging.getLogger(__name__)


def load_classifier(
    model: str = DEFAULT_MODEL,
    *,
    device: str = "cpu",
    device_index: int = 0,
    dtype: Dtype = "auto",
    revision: str = "",
    sha256: str = "",
    tokenizer: str = "",
    quick_gelu: bool | None = None,
    bundle: str | Path | None = None,
    design: str | None = None,
    template: Template = DEFAULT_TEMPLATE,
    selection_ratio: float = 0.1,
    view_area: tuple[float, float] = AREA,
    adapts: Adapts = "vision",
    alignment_weight: float = 100.0,
    gamma: float = 0.5,
    of_mean: bool = True,
    learning_rate: float = 5e-4,
    early_stop: float = 0.0,
) -> DefendedClassifier:
    """Load a checkpoint with its bundle and set up the objective.

    Args:
        model, revision, sha256, tokenizer, quick_gelu: see `load_checkpoint`.
        device, device_index: see `pick_device`.
        dtype: see `choose_precision`.
        bundle: directory or hub id of a defense bundle, see `find_bundle`; by default the one
            beside the checkpoint, if any.
        design: the design that the bundle must have; None takes any.
        template, selection_ratio: see `DefendedClassifier`.
        view_area: see `Preprocessing`.
        adapts, alignment_weight, gamma, of_mean, learning_rate, early_stop: see `Objective`.

    Raises:
        LoadError: the device is missing, or the checkpoint or bundle cannot be used.
    """
    place = pick_device(device, device_index)
    checkpoint = load_checkpoint(model, place, dtype, revision, sha256, tokenizer, quick_gelu)
    preprocessing = replace(checkpoint.preprocessing, area=view_area)
    checkpoint = replace(checkpoint, preprocessing=preprocessing)
    found = _find_bundle(checkpoint, bundle, design)
    objective = Objective(
        reference=None if found is None else found.statistics,
        layers=0 if found is None else found.layers,
        alignment_weight=alignment_weight,
        gamma=gamma,
        of_mean=of_mean,
        learning_rate=learning_rate,
        adapts=adapts,
        early_stop=early_stop,
    )
    return DefendedClassifier(checkpoint, found, objective, selection_ratio, template)


def _find_bundle(
    checkpoint: Checkpoint, directory: str | Path | None, design: str | None
) -> DefenseBundle | None:
    beside = checkpoint.directory / FOLDER
    if not directory and not beside.is_dir():
        log.warning(
            "no defense bundle for %s: only the template's words adapt, by the entropy alone",
            checkpoint.name,
        )
        return None
    directory = find_bundle(str(directory)) if directory else beside
    bundle = load_bundle(directory, checkpoint.clip, checkpoint.sha256)
    if design is not None and bundle.prompts.design != design:
        raise LoadError(
            f"the bundle {directory} is of design {bundle.prompts.design}, "
            f"the settings ask for {design}"
        )
    return bundle
