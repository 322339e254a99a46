"""What the code must look like that no linter checks."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("package", ["service", "models", "research", "benchmarks"])
def test_modules_stay_small(package: str) -> None:
    modules = list((ROOT / package).rglob("*.py"))
    assert modules
    for path in modules:
        lines = len(path.read_text().splitlines())
        assert lines <= 350, f"{path} has {lines} lines; does it hold one idea?"


def test_models_read_no_environment() -> None:
    for path in (ROOT / "models").rglob("*.py"):
        assert "environ" not in path.read_text(), path
