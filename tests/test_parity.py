"""The reference code's figures hold, and a wrong figure is noticed."""

import shutil
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import save_file

from benchmarks import parity

FIGURES = Path(__file__).parent / "figures"


def test_every_reference_figure_holds(capsys: pytest.CaptureFixture[str]) -> None:
    assert parity.main(["--figures", str(FIGURES)]) == 0
    report = capsys.readouterr().out
    for design in ("tapt_v_", "tapt_vli_", "tapt_vlj_"):
        assert design in report


@pytest.mark.parametrize(
    "name", ["expected.grad_last_step.text", "expected.prompt_after.vision", "expected.selected"]
)
def test_a_tampered_figure_fails(tmp_path: Path, name: str) -> None:
    shutil.copytree(FIGURES / "clip_small", tmp_path / "clip_small")
    source = FIGURES / "tapt_vli_small_steps1_g050_seed3.safetensors"
    with safe_open(source, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    value = tensors[name].clone()
    value.view(-1)[0] += 1 if name == "expected.selected" else 2e-3
    save_file({**tensors, name: value}, tmp_path / source.name, metadata)
    assert parity.main(["--figures", str(tmp_path)]) == 1


def test_a_directory_without_figures_is_said_so(tmp_path: Path) -> None:
    assert parity.main(["--figures", str(tmp_path)]) == 2
