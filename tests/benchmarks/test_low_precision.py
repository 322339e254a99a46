"""The command that compares variants of the pass without a gradient, on a few drawn pictures."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from benchmarks.low_precision import VARIANTS, main
from models.checkpoint import load_checkpoint
from tests import tiny

WITHOUT_COMPILER = ["bfloat16", "int8"]


def test_a_variant_is_a_copy_that_computes_nearly_the_same() -> None:
    clip = load_checkpoint("embedded", torch.device("cpu")).clip
    views = torch.rand(1, 2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = clip.encode_images(views).features
        for name in WITHOUT_COMPILER:
            features = VARIANTS[name](clip)(views, None)
            assert not torch.equal(features, whole)
            assert F.cosine_similarity(features, whole, dim=-1).min() > 0.99
        assert torch.equal(clip.encode_images(views).features, whole)


def test_the_table_has_a_row_for_each_variant(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for place, label in enumerate(tiny.LABELS[:3]):
        (tmp_path / label).mkdir()
        Image.fromarray(tiny.draw_image(place)).save(tmp_path / label / "one.png")
    flags = ["--data", str(tmp_path), "--images", "3", "--attacked", "1", "--views", "4"]
    assert main([*flags, "--rounds", "1", "--variants", *WITHOUT_COMPILER]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| `")]
    assert [row.split("`")[1] for row in rows] == ["float32", *WITHOUT_COMPILER]
    assert all(row.count("%") == 9 for row in rows[1:])
