"""The command that compares precisions, on a few drawn pictures."""

from pathlib import Path

import pytest
from PIL import Image

from benchmarks import agreement
from models.data import Dataset, open_dataset
from tests import tiny


@pytest.fixture
def data(tmp_path: Path) -> Dataset:
    for place, label in enumerate(tiny.LABELS[:4]):
        (tmp_path / label).mkdir()
        Image.fromarray(tiny.draw_image(place)).save(tmp_path / label / "one.png")
    return open_dataset(tmp_path)


@pytest.mark.parametrize(("least", "status"), [(0.0, 0), (1.01, 1)])
def test_agreement_is_a_share_of_the_images(
    data: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str], least: float, status: int
) -> None:
    flags = ["--data", str(tmp_path), "--labels", "3", "--views", "4", "--methods", "plain"]
    assert agreement.main([*flags, "--least", str(least)]) == status
    shown = capsys.readouterr().out
    assert "| bfloat16 | `plain` | " in shown
    assert "| float16 | `plain` | " in shown
    assert "4 photographs of" in shown
    assert str(tmp_path.parent) not in shown
