"""The reference code's figures hold, and a wrong figure is noticed."""

import shutil
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import save_file

from benchmarks.parity.__main__ import main

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
