"""A hub of repositories that are directories, in place of huggingface_hub's functions."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
from huggingface_hub.utils._paths import filter_repo_objects

import models.hub

COMMIT = "c" * 40


class FakeHub:
    """Snapshots lie in `cache`, as those of the real hub do: one directory a commit.

    Attributes:
        repositories: directories by hub id.
        asked: id and revision of every download.
    """

    def __init__(self, cache: Path, **repositories: Path) -> None:
        self.cache = cache
        self.repositories = {name.replace("__", "/"): path for name, path in repositories.items()}
        self.asked: list[tuple[str, str | None]] = []

    def download(self, name: str, revision: str | None, allow_patterns: Sequence[str]) -> str:
        """In place of `snapshot_download`."""
        self.asked.append((name, revision))
        source, snapshot = self.repositories[name], self.cache / name.replace("/", "--") / COMMIT
        files = [str(f.relative_to(source)) for f in source.rglob("*") if f.is_file()]
        for file in filter_repo_objects(files, allow_patterns=list(allow_patterns)):
            (snapshot / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source / file, snapshot / file)
        return str(snapshot)

    def fetched(self, name: str) -> set[str]:
        """The files of a repository that were downloaded."""
        snapshot = self.cache / name.replace("/", "--") / COMMIT
        return {str(f.relative_to(snapshot)) for f in snapshot.rglob("*") if f.is_file()}


def install(patch: pytest.MonkeyPatch, cache: Path, **repositories: Path) -> FakeHub:
    """Use a fake hub in this test; `owner__name` is the repository `owner/name`."""
    hub = FakeHub(cache, **repositories)
    patch.setattr(models.hub, "snapshot_download", hub.download)
    return hub
