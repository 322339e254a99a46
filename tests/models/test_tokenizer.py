"""The tokenizer of a checkpoint, or another one that fits it."""

import shutil
from pathlib import Path

import pytest

import models.hub
from models.checkpoint import load_checkpoint
from models.errors import LoadError
from models.shipped import EMBEDDED
from tests import tiny


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_checkpoint(tmp_path_factory.mktemp("models") / "whole")


@pytest.fixture
def bare(whole: Path, tmp_path: Path) -> Path:
    """A checkpoint without a tokenizer."""
    copy = Path(shutil.copytree(whole, tmp_path / "bare"))
    for file in copy.glob("*token*"):
        file.unlink()
    return copy


def ids(checkpoint: Path, tokenizer: str = "") -> list[int]:
    loaded = load_checkpoint(str(checkpoint), tiny.CPU, tokenizer=tokenizer)
    found: list[int] = loaded.tokenizer("a photo of a school bus")["input_ids"]
    return found


def test_another_tokenizer_is_taken_from_a_directory(whole: Path, bare: Path) -> None:
    assert ids(bare, str(whole)) == ids(whole)


def test_the_file_of_the_tokenizer_alone_is_enough(whole: Path, bare: Path, tmp_path: Path) -> None:
    (tmp_path / "alone").mkdir()
    shutil.copy(whole / "tokenizer.json", tmp_path / "alone")
    assert ids(bare, str(tmp_path / "alone")) == ids(whole)


def test_another_tokenizer_is_taken_from_the_hub(
    whole: Path, bare: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def download(name: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((name, revision))
        assert not [pattern for pattern in allow_patterns if "safetensors" in pattern]
        return str(whole)

    monkeypatch.setattr(models.hub, "snapshot_download", download)
    assert ids(bare, "some/tokenizer") == ids(bare, "some/tokenizer@0123abcd") == ids(whole)
    assert asked == [("some/tokenizer", None), ("some/tokenizer", "0123abcd")]


def test_a_missing_tokenizer_is_explained(bare: Path, tmp_path: Path) -> None:
    with pytest.raises(LoadError, match=r"bare has no tokenizer .* set TAPT_TOKENIZER"):
        ids(bare)
    (tmp_path / "empty").mkdir()
    with pytest.raises(LoadError, match="empty has no tokenizer"):
        ids(bare, str(tmp_path / "empty"))


def test_a_tokenizer_with_more_ids_than_the_model_is_refused(whole: Path) -> None:
    with pytest.raises(LoadError, match=r"has ids up to 8154, and .*whole has \d+ text"):
        ids(whole, str(EMBEDDED))


def test_a_tokenizer_that_ends_texts_otherwise_is_refused(bare: Path, whole: Path) -> None:
    config = bare / "config.json"
    end = '"eos_token_id": 1,'
    assert end in config.read_text()
    config.write_text(config.read_text().replace(end, '"eos_token_id": 600,'))
    with pytest.raises(LoadError, match=r"ends texts with id 1, and .*bare expects 600"):
        ids(bare, str(whole))
