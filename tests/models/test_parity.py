"""The reference code's figures hold, and a wrong figure is noticed."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.parity import kinks
from benchmarks.parity import tapt as parity
from benchmarks.parity.__main__ import main
from benchmarks.parity.figures import load_checkpoint, read
from models.prompts import DefensePrompts

FIGURES = Path(__file__).parents[1] / "figures"


def test_every_reference_figure_holds(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--figures", str(FIGURES)]) == 0
    report = capsys.readouterr().out
    for name in ("tapt_v_", "tapt_vli_", "tapt_vlj_", "rtpt_", "ttc_", "openclip_"):
        assert name in report


@pytest.mark.parametrize(
    ("file", "name", "by"),
    [
        ("tapt_vli_small_steps1_g050_seed3", "expected.grad_last_step.text", 2e-3),
        ("tapt_vli_small_steps1_g050_seed3", "expected.prompt_after.vision", 2e-3),
        ("tapt_vli_small_steps1_g050_seed3", "expected.selected", 1),
        ("tapt_vlj_small_steps1_g050_seed3", "expected.grad_last_step.text", 2e-3),
        ("tapt_vlj_small_steps1_g050_seed3", "expected.grad_last_step.projection.weight", 2e-3),
        ("tapt_vlj_small_steps1_g050_seed3", "expected.grad_last_step.projection.bias", 2e-3),
        ("tapt_vlj_small_steps1_g050_seed3", "expected.prompt_after.text", 2e-3),
        ("rtpt_small_seed3", "expected.context_after", 2e-6),
        ("rtpt_small_seed3", "expected.weights", 2e-4),
        ("rtpt_small_seed3", "expected.logits", 2e-4),
        ("ttc_small_seed3", "expected.delta", 2e-6),
        ("ttc_small_seed3", "expected.features", 2e-4),
        ("ttc_small_seed3", "noise", 2e-3),
        ("openclip_half", "expected.image_features", 2e-4),
        ("openclip_custom_text", "expected.text_features", 2e-4),
        ("openclip_custom_text", "expected.logit_scale", 2e-4),
        ("openclip_quickgelu_patch14", "expected.logits", 2e-4),
    ],
)
def test_a_tampered_figure_fails(tmp_path: Path, file: str, name: str, by: float) -> None:
    checkpoint = file if file.startswith("openclip_") else "clip_small"
    shutil.copytree(FIGURES / checkpoint, tmp_path / checkpoint)
    source = FIGURES / f"{file}.safetensors"
    with safe_open(source, "pt") as figures:
        tensors = {key: figures.get_tensor(key) for key in figures.keys()}  # noqa: SIM118
        metadata = figures.metadata()
    value = tensors[name].clone()
    value.view(-1)[0] += by
    save_file({**tensors, name: value}, tmp_path / source.name, metadata)
    assert main(["--figures", str(tmp_path)]) == 1


def test_signs_that_rounding_decides_are_settled_and_nothing_else() -> None:
    """In VLJ another processor may find other signs for prompt tokens that are their own reference;
    a larger change, or one of another token, is an error."""
    figures = read(FIGURES / "tapt_vlj_small_steps1_g050_seed3.safetensors")
    prompts = DefensePrompts("vlj", {k: v[None] for k, v in figures.under("prompt.").items()})
    clip, objective = load_checkpoint(FIGURES / "clip_small"), parity._objective(figures)
    assert objective.reference is not None
    term = objective.alignment_weight / objective.layers * 0.5
    term /= objective.reference.clean_mean[0].numel()
    start = "grad_last_step."
    published = {k.removeprefix(start): v[None] for k, v in figures.expected.items() if start in k}
    text = figures.given["prompt.text"]

    def found(layer: int, terms: float) -> dict[str, Tensor]:
        """Theirs, but for one value of a visual prompt of one layer."""
        change = torch.zeros(*text.shape[:2], 128)
        change[layer, 0, 5] = terms * term
        return {
            "text": published["text"] + change @ figures.given["prompt.projection.weight"],
            "projection.weight": published["projection.weight"] + change.mT @ text,
            "projection.bias": published["projection.bias"] + change.sum(dim=1),
        }

    def left(ours: dict[str, Tensor]) -> float:
        settled = kinks.settle(figures, clip, prompts, ours, objective)
        return max((settled[k] - published[k]).abs().max().item() for k in published)

    assert left(found(1, 2)) < 1e-6
    assert left(found(1, 3)) > 0.5 * term
    assert left(found(2, 1)) > 0.5 * term  # which the alignment leaves out
    assert left(found(0, 40)) > 0.5 * term  # more than the layer norm can make of two


def test_a_wrong_activation_fails(tmp_path: Path) -> None:
    name = "openclip_quickgelu_patch14"
    shutil.copytree(FIGURES / name, tmp_path / name)
    shutil.copy(FIGURES / f"{name}.safetensors", tmp_path)
    assert main(["--figures", str(tmp_path)]) == 0
    config = tmp_path / name / "open_clip_config.json"
    config.write_text(config.read_text().replace('"quick_gelu": true', '"quick_gelu": false'))
    assert main(["--figures", str(tmp_path)]) == 1


@pytest.mark.parametrize("name", ["openclip_half", "ttc_small_seed3"])
def test_figures_without_their_checkpoint_are_said_so(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(FIGURES / f"{name}.safetensors", tmp_path)
    assert main(["--figures", str(tmp_path)]) == 2
    assert name in capsys.readouterr().err


def test_a_directory_without_figures_is_said_so(tmp_path: Path) -> None:
    assert main(["--figures", str(tmp_path)]) == 2
