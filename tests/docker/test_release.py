"""`docker/release.sh` in a small repository, with tools that only log their calls."""

import os
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
TOOL = """#!/bin/sh
echo "$(basename "$0") $*" >>"$CALLS"
[ "$(basename "$0")" != uv ] || { mkdir -p dist && echo wheel >dist/tapt_serve.whl; }
"""


class Checkout:
    """A repository whose version is 1.2.3, with its release script."""

    def __init__(self, root: Path) -> None:
        self.root, self.calls, tools = root / "checkout", root / "calls", root / "tools"
        (self.root / "docker").mkdir(parents=True)
        tools.mkdir()
        shutil.copy(ROOT / "docker/release.sh", self.root / "docker")
        (self.root / "pyproject.toml").write_text('[project]\nname = "x"\nversion = "1.2.3"\n')
        (self.root / ".gitignore").write_text("dist/\n")
        for name in ("docker", "podman", "uv"):
            (tools / name).write_text(TOOL)
            (tools / name).chmod(0o755)
        who = {
            f"GIT_{role}_{part}": "a"
            for role in ("AUTHOR", "COMMITTER")
            for part in ("NAME", "EMAIL")
        }
        self._env = (
            os.environ
            | who
            | {
                "PATH": f"{tools}:{os.environ['PATH']}",
                "UV": "uv",
                "CALLS": str(self.calls),
            }
        )
        self.git("init", "--quiet")

    def git(self, *words: str) -> None:
        subprocess.run(["git", *words], cwd=self.root, env=self._env, check=True)

    def commit(self, changelog: str) -> None:
        (self.root / "CHANGELOG.md").write_text(changelog)
        self.git("add", "--all")
        self.git("commit", "--quiet", "--message", "all")

    def release(self) -> "subprocess.CompletedProcess[str]":
        command = ["docker/release.sh", "registry.example.com"]
        return subprocess.run(command, cwd=self.root, env=self._env, capture_output=True, text=True)


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


def test_the_wheel_and_both_images_are_built(checkout: Checkout) -> None:
    checkout.commit("# Changelog\n\n## Unreleased\n\n## 1.2.3 (2030-01-01)\n")
    checkout.git("tag", "v1.2.3")
    done = checkout.release()
    assert done.returncode == 0, done.stderr
    assert [line for line in checkout.calls.read_text().splitlines() if "info" not in line] == [
        "uv build --wheel --out-dir dist",
        *(
            f"docker build --file docker/Dockerfile --target {target} "
            f"--tag registry.example.com/tapt-serve:1.2.3-{target} ."
            for target in ("cpu", "cuda")
        ),
    ]
    assert (checkout.root / "dist/SHA256SUMS").read_text().endswith("  tapt_serve.whl\n")


@pytest.mark.parametrize(
    ("changelog", "tag", "change", "message"),
    [
        ("## 1.2.3 (2030-01-01)\n", "v1.2.3", True, "The checkout has changes: commit them first."),
        (
            "## 1.2.3 (2030-01-01)\n",
            "v1.2.2",
            False,
            "This commit is not tagged v1.2.3, the version in pyproject.toml.",
        ),
        ("## Unreleased\n", "v1.2.3", False, "CHANGELOG.md has no section '## 1.2.3 (DATE)'."),
    ],
)
def test_nothing_is_built_before_all_is_in_order(
    checkout: Checkout, changelog: str, tag: str, change: bool, message: str
) -> None:
    checkout.commit(changelog)
    checkout.git("tag", tag)
    if change:
        (checkout.root / "new").touch()
    done = checkout.release()
    assert (done.returncode, done.stderr) == (1, f"{message}\n")
    assert not checkout.calls.exists()


def test_the_overlays_name_the_version() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    for overlay, target in (("cpu", "cpu"), ("gpu", "cuda")):
        text = (ROOT / f"k8s/overlays/{overlay}/kustomization.yaml").read_text()
        (image,) = yaml.safe_load(text)["images"]
        assert image["newTag"] == f"{version}-{target}"
    assert f"tapt-serve:{version}-cpu" in (ROOT / "README.md").read_text()
