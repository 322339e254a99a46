"""A bundle is whole and belongs to its checkpoint and prompts, or is refused."""

import json
from pathlib import Path

import pytest
import torch

from models.bundle import load_bundle
from models.checkpoint import Checkpoint
from models.errors import LoadError
from tests import tiny


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return tiny.load(tiny.save_checkpoint(tmp_path_factory.mktemp("clip")))


@pytest.mark.parametrize("design", ["v", "vli", "vlj"])
def test_a_bundle_comes_back_as_it_was(checkpoint: Checkpoint, tmp_path: Path, design: str) -> None:
    bundle = tiny.make_bundle(checkpoint, design)
    bundle.save(tmp_path / "bundle")
    bundle.save(tmp_path / "bundle")  # over itself, in one move
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
    again = load_bundle(tmp_path / "bundle", checkpoint.clip, checkpoint.sha256)
    assert again.describe() == bundle.describe()
    for name, value in bundle.prompts.tensors.items():
        assert torch.equal(again.prompts.tensors[name], value)


def test_another_checkpoint_is_refused_by_both_names(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    tiny.make_bundle(checkpoint).save(tmp_path / "bundle")
    with pytest.raises(LoadError) as raised:
        load_bundle(tmp_path / "bundle", checkpoint.clip, "0123")
    assert checkpoint.sha256 in str(raised.value)
    assert "0123" in str(raised.value)


def test_statistics_of_other_prompts_are_refused_by_both_names(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    bundle, other = tiny.make_bundle(checkpoint), tiny.make_bundle(checkpoint, seed=2)
    bundle.save(tmp_path / "bundle")
    meta = tmp_path / "bundle" / "bundle.json"
    values = json.loads(meta.read_text())
    meta.write_text(json.dumps({**values, "prompts_sha256": other.prompts_sha256}))
    with pytest.raises(LoadError) as raised:
        load_bundle(tmp_path / "bundle", checkpoint.clip, checkpoint.sha256)
    assert other.prompts_sha256 in str(raised.value)
    assert bundle.prompts_sha256 in str(raised.value)


@pytest.mark.parametrize("name", ["bundle.json", "bundle.safetensors"])
def test_half_a_bundle_is_refused(checkpoint: Checkpoint, tmp_path: Path, name: str) -> None:
    tiny.make_bundle(checkpoint).save(tmp_path / "bundle")
    file = tmp_path / "bundle" / name
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(LoadError, match="not a complete defense bundle"):
        load_bundle(tmp_path / "bundle", checkpoint.clip, checkpoint.sha256)


def test_shapes_of_another_model_are_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    other = tiny.load(tiny.save_checkpoint(tmp_path / "clip", width=32))
    tiny.make_bundle(other).save(tmp_path / "bundle")
    with pytest.raises(LoadError, match="do not fit"):
        load_bundle(tmp_path / "bundle", checkpoint.clip, other.sha256)
