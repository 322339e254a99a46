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
    for name in ("tapt_v_", "tapt_vli_", "tapt_vlj_", "rtpt_", "ttc_"):
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
    ],
)
def test_a_tampered_figure_fails(tmp_path: Path, file: str, name: str, by: float) -> None:
    shutil.copytree(FIGURES / "clip_small", tmp_path / "clip_small")
    source = FIGURES / f"{file}.safetensors"
    with safe_open(source, "pt") as figures:
        tensors = {key: figures.get_tensor(key) for key in figures.keys()}  # noqa: SIM118
        metadata = figures.metadata()
    value = tensors[name].clone()
    value.view(-1)[0] += by
    save_file({**tensors, name: value}, tmp_path / source.name, metadata)
    assert main(["--figures", str(tmp_path)]) == 1


def test_a_directory_without_figures_is_said_so(tmp_path: Path) -> None:
    assert main(["--figures", str(tmp_path)]) == 2
