"""Modules stay small; what may import what is in `pyproject.toml`, checked by `lint-imports`."""

from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_modules_stay_small() -> None:
    for package in ("service", "models", "research"):
        for path in (ROOT / package).rglob("*.py"):
            lines = len(path.read_text().splitlines())
            assert lines <= 350, f"{path} has {lines} lines; does it hold one idea?"


def test_models_read_no_environment() -> None:
    for path in (ROOT / "models").rglob("*.py"):
        assert "environ" not in path.read_text(), path
