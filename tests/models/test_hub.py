"""What is fetched of a hub repository: one format's weights, of one commit."""

import shutil
from pathlib import Path

import pytest
from transformers import CLIPModel

from models.checkpoint import load_checkpoint
from models.errors import LoadError
from models.loading import load_classifier
from service.cli import main
from tests import fake_hub, open_clip, tiny
from tests.fake_hub import COMMIT
from tests.models.test_conversion import model_cfg


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_checkpoint(tmp_path_factory.mktemp("models") / "whole", legacy_eos=True)


def add_open_clip(directory: Path, pickled: bool = False) -> None:
    model = CLIPModel.from_pretrained(directory)
    open_clip.write(directory, model, model_cfg(model), pickled=pickled)


def test_of_two_formats_one_is_downloaded(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = Path(shutil.copytree(whole, tmp_path / "both"))
    add_open_clip(both)
    add_open_clip(both, pickled=True)
    (both / "modeling_own.py").write_text("raise SystemExit")
    alone = Path(shutil.copytree(both, tmp_path / "alone"))
    (alone / "config.json").write_text('{"architecture": "vit_base_patch16_clip_224"}')
    hub = fake_hub.install(monkeypatch, tmp_path / "cache", a__both=both, a__alone=alone)
    load_checkpoint("a/both", tiny.CPU, revision="v1")
    load_checkpoint("a/alone", tiny.CPU)
    weights = {"model.safetensors", "open_clip_model.safetensors"}
    assert hub.fetched("a/both") & weights == {"model.safetensors"}
    assert hub.fetched("a/alone") & weights == {"open_clip_model.safetensors"}
    assert not {f for f in hub.fetched("a/both") if f.endswith((".bin", ".py"))}
    # The weights are of the commit that the configuration was of.
    assert hub.asked == [
        ("a/both", "v1"),
        ("a/both", COMMIT),
        ("a/alone", None),
        ("a/alone", COMMIT),
    ]


def test_pickled_weights_are_downloaded_to_convert_only(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Path(shutil.copytree(whole, tmp_path / "source"))
    add_open_clip(source, pickled=True)
    (source / "model.safetensors").unlink()
    hub = fake_hub.install(monkeypatch, tmp_path / "cache", a__pickled=source)
    with pytest.raises(LoadError, match="a/pickled holds no safetensors weights"):
        load_checkpoint("a/pickled", tiny.CPU)
    assert "open_clip_pytorch_model.bin" not in hub.fetched("a/pickled")
    assert main(["convert", "a/pickled", str(tmp_path / "out")]) == 0
    assert load_checkpoint(str(tmp_path / "out"), tiny.CPU).clip.image_size == 32


def test_a_bundle_beside_the_weights_is_downloaded(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Path(shutil.copytree(whole, tmp_path / "source"))
    tiny.make_bundle(tiny.load(source)).save(source / "bundle")
    fake_hub.install(monkeypatch, tmp_path / "cache", a__bundled=source)
    bundle = load_classifier("a/bundled").bundle
    assert bundle is not None
    assert bundle.prompts.design == "vli"
