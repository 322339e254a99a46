"""How far the learning of prompts is, on disk, so that a run that was stopped goes on."""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from models.calibration import processes
from models.calibration.prompt_tuning import Progress
from models.checkpoint import Checkpoint
from models.prompts import DefensePrompts


def save_progress(partial: Path, settings: dict[str, Any], progress: Progress) -> None:
    """Tensors first, then the file that says how far they are: one without the other is no
    progress. Only the first process saves."""
    if processes.rank():
        return
    partial.mkdir(parents=True, exist_ok=True)
    tensors = {f"prompts.{k}": v for k, v in progress.prompts.tensors.items()}
    for name, (first, second) in progress.moments.items():
        tensors |= {f"first.{name}": first, f"second.{name}": second}
    meta = {"settings": settings, "step": progress.step, "losses": progress.losses}
    scratch = partial / f"{progress.step}.tmp"
    save_file({k: v.contiguous().cpu() for k, v in tensors.items()}, scratch)
    scratch.replace(partial / f"{progress.step}.safetensors")
    scratch.write_text(json.dumps(meta))
    scratch.replace(partial / "progress.json")
    for old in partial.glob("*.safetensors"):
        if old.stem != str(progress.step):
            old.unlink()


def resume_progress(
    partial: Path, settings: dict[str, Any], checkpoint: Checkpoint
) -> Progress | None:
    """The progress of an earlier run with these very settings, if there is one."""
    try:
        meta = json.loads((partial / "progress.json").read_text())
        if meta["settings"] != settings:
            return None
        tensors = load_file(partial / f"{meta['step']}.safetensors")
    except (OSError, ValueError, KeyError, SafetensorError):
        return None
    groups: dict[str, dict[str, Tensor]] = {"prompts": {}, "first": {}, "second": {}}
    for name, value in tensors.items():
        group, _, key = name.partition(".")
        groups[group][key] = value.clone().to(checkpoint.clip.device)
    moments = {name: (groups["first"][name], groups["second"][name]) for name in groups["first"]}
    prompts = DefensePrompts(settings["design"], groups["prompts"])
    return Progress(prompts, moments, meta["step"], meta["losses"])
