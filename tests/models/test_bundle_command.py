"""Bundles on the hub: pushed, shown, and served from there."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import HfApi

import models.bundle_command
from models.errors import LoadError
from models.loading import load_classifier
from service.cli import main
from tests import fake_hub, tiny
from tests.fake_hub import COMMIT


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_checkpoint(tmp_path_factory.mktemp("models") / "whole")


@pytest.fixture(scope="module")
def bundle(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("bundles") / "mine"
    tiny.make_bundle(tiny.load(whole)).save(directory)
    return directory


class FakeApi:
    """A hub that takes uploads to a directory."""

    root: Path
    repositories: list[tuple[str, bool]]

    def create_repo(self, repo_id: str, private: bool, exist_ok: bool) -> None:
        assert exist_ok
        self.repositories.append((repo_id, private))

    def upload_folder(self, **given: Any) -> SimpleNamespace:
        target = self.root / given["repo_id"] / given["path_in_repo"]
        target.mkdir(parents=True)
        for pattern in given["allow_patterns"]:
            for file in Path(given["folder_path"]).glob(pattern):
                shutil.copy(file, target)
        return SimpleNamespace(oid=COMMIT)


def test_a_pushed_bundle_is_served(
    whole: Path, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    FakeApi.root, FakeApi.repositories = tmp_path / "hub", []
    monkeypatch.setattr(models.bundle_command, "HfApi", FakeApi)
    copy = Path(shutil.copytree(bundle, tmp_path / "copy"))
    (copy / "notes.txt").write_text("not part of it")
    assert main(["bundle", "push", str(copy), "me/my-clip", "--private"]) == 0
    setting = capsys.readouterr().out.strip().removeprefix("TAPT_BUNDLE=")
    assert setting == f"me/my-clip@{COMMIT}"
    assert FakeApi.repositories == [("me/my-clip", True)]

    repository = tmp_path / "hub" / "me" / "my-clip"
    hub = fake_hub.install(monkeypatch, tmp_path / "cache", **{"me__my-clip": repository})
    found = load_classifier(str(whole), bundle=setting).bundle
    assert found is not None
    assert found.prompts.design == "vli"
    assert hub.asked == [("me/my-clip", COMMIT)]
    assert hub.fetched("me/my-clip") == {"bundle/bundle.json", "bundle/bundle.safetensors"}


def test_a_bundle_at_the_top_of_a_repository_is_served(
    whole: Path, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = fake_hub.install(monkeypatch, tmp_path / "cache", me__bundle=bundle)
    assert load_classifier(str(whole), bundle="me/bundle").bundle is not None
    assert hub.asked == [("me/bundle", None)]


def test_a_bundle_is_shown(whole: Path, bundle: Path, capsys: Any) -> None:
    assert main(["bundle", "show", str(bundle)]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["checkpoint_sha256"] == tiny.load(whole).sha256
    assert shown["prompts"]["text"] == [1, 2, 2, 64]


def test_a_damaged_bundle_is_neither_shown_nor_pushed(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(models.bundle_command, "HfApi", None)  # would fail if it were called
    copy = Path(shutil.copytree(bundle, tmp_path / "copy"))
    (copy / "bundle.safetensors").write_bytes(b"damaged")
    for arguments in (["show", str(copy)], ["push", str(copy), "me/my-clip"]):
        assert main(["bundle", *arguments]) == 1
        assert "is not a complete defense bundle" in capsys.readouterr().err


def test_what_the_hub_refuses_is_one_sentence(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def refuse(self: object, *given: Any, **named: Any) -> None:
        raise OSError("401 Client Error\nlog in first")

    monkeypatch.setattr(HfApi, "create_repo", refuse)
    assert main(["bundle", "push", str(bundle), "me/my-clip"]) == 1
    assert (
        capsys.readouterr().err == "the bundle cannot be pushed to me/my-clip: 401 Client Error\n"
    )


def test_a_missing_bundle_is_named(whole: Path, tmp_path: Path) -> None:
    with pytest.raises(LoadError, match="missing is not a complete defense bundle"):
        load_classifier(str(whole), bundle=tmp_path / "missing")
