"""Whose weights are loaded: safetensors alone, of one revision, of one hash."""

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.calibration import harden
from models.calibration import options as calibration_options
from models.checkpoint import find_checkpoint, load_checkpoint
from models.errors import LoadError
from models.evaluation import options as evaluation_options
from models.loading import load_classifier
from models.shipped import DEFAULT_MODEL, HARDENED, SHIPPED
from service.settings import Settings
from service.worker.runner import Runner
from tests import tiny


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_checkpoint(tmp_path_factory.mktemp("models") / "original")


@pytest.fixture
def directory(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "copy"))


def hostile(directory: Path) -> tuple[bytes, Path]:
    mark = directory.parent / "executed"
    return pickle.dumps(tiny.Payload(mark)), mark


def test_a_payload_would_show(tmp_path: Path) -> None:
    content, mark = hostile(tmp_path / "x")
    pickle.loads(content)
    assert mark.exists()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.safetensors"])
def test_a_pickled_checkpoint_is_refused_and_not_executed(directory: Path, name: str) -> None:
    (directory / "model.safetensors").unlink()
    content, mark = hostile(directory)
    (directory / name).write_bytes(content)
    with pytest.raises(LoadError):
        tiny.load(directory)
    assert not mark.exists()


def test_a_pickle_beside_the_weights_is_left_alone(directory: Path) -> None:
    content, mark = hostile(directory)
    (directory / "pytorch_model.bin").write_bytes(content)
    tiny.load(directory)
    assert not mark.exists()


@pytest.mark.parametrize("name", ["weights.bin", "../copy/weights.bin", "weights.safetensors"])
def test_an_index_cannot_name_what_was_not_hashed(directory: Path, name: str) -> None:
    content, mark = hostile(directory)
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").rename(directory / "model-1-of-1.safetensors")
    (directory / "weights.bin").write_bytes(content)
    save_file({key: value + 1 for key, value in tensors.items()}, directory / "weights.safetensors")
    index = directory / "model.safetensors.index.json"

    def point_at(file: str) -> None:
        index.write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(tensors, file)}))

    point_at("model-1-of-1.safetensors")
    tiny.load(directory)
    point_at(name)
    with pytest.raises(LoadError, match="names weights that are none"):
        tiny.load(directory)
    assert not mark.exists()


def test_a_config_cannot_name_what_was_not_hashed(directory: Path) -> None:
    shutil.copy(directory / "model.safetensors", directory / "other.safetensors")
    config = json.loads((directory / "config.json").read_text())
    changed = config | {"transformers_weights": "other.safetensors"}
    (directory / "config.json").write_text(json.dumps(changed))
    with pytest.raises(LoadError, match=r"other\.safetensors"):
        tiny.load(directory)


def test_only_the_weights_that_were_named_are_served(original: Path, directory: Path) -> None:
    found = tiny.load(original).sha256
    assert load_checkpoint(str(directory), tiny.CPU, sha256=found).sha256 == found
    tensors = load_file(directory / "model.safetensors")
    tensors["logit_scale"] = tensors["logit_scale"] + 1e-3
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(LoadError, match=f"{found} is asked for"):
        load_checkpoint(str(directory), tiny.CPU, sha256=found)


def test_the_worker_checks_what_the_settings_name(original: Path) -> None:
    knobs: dict[str, Any] = {"model": str(original), "device": "cpu", "views": 2}
    with pytest.raises(Exception, match="is asked for"):
        Runner(Settings(**knobs, model_sha256="0" * 64), 0)
    found = tiny.load(original).sha256
    Runner(Settings(**knobs, model_sha256=found.upper()), 0)
    with pytest.raises(Exception, match="has no revision"):
        Runner(Settings(**knobs, model_revision="main"), 0)
    with pytest.raises(ValueError, match="model_sha256"):
        Settings(model_sha256="abc")


def test_a_checkpoint_of_the_package_has_a_name_and_no_revision() -> None:
    for name in SHIPPED:
        assert load_checkpoint(name, torch.device("cpu")).name == name
        with pytest.raises(LoadError, match="no revision main"):
            find_checkpoint(name, revision="main")


def test_the_default_model_is_served_with_its_bundle() -> None:
    settings = Settings()
    assert settings.model == DEFAULT_MODEL
    classifier = load_classifier(design=settings.design)
    assert classifier.checkpoint.name == DEFAULT_MODEL
    assert classifier.bundle is not None


def test_commands_take_the_default_model_and_harden_its_base() -> None:
    for parser in (evaluation_options.parser(), calibration_options.make_parser()):
        assert parser.get_default("model") == DEFAULT_MODEL
    assert harden.make_parser().get_default("model") == "embedded"


def test_the_hardened_checkpoint_tells_what_it_was_made_from() -> None:
    made = json.loads((HARDENED / "hardening.json").read_text())
    assert made["checkpoint_sha256"] == find_checkpoint("embedded").sha256
    assert made["checkpoint_sha256"] != find_checkpoint("embedded-hardened").sha256
