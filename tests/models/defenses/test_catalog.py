"""The catalog agrees with the modules that it lists, and knows them without importing torch."""

import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from models.defenses.catalog import DEFENSES, _read_spec, table
from models.defenses.defense import load_defense

DOCS = Path(__file__).parents[3] / "docs"
FACTS = "from models.defenses.catalog import DEFENSES; import sys; assert DEFENSES; "


def test_defenses_are_listed_in_their_order() -> None:
    names = "plain ensemble apt apt-ensemble tapt tpt rtpt ttc mac gate thrift"
    assert list(DEFENSES) == names.split()


@pytest.mark.parametrize("name", DEFENSES)
def test_the_spec_is_the_modules_own(name: str) -> None:
    spec = DEFENSES[name]
    assert spec == import_module(spec.module).SPEC
    assert callable(load_defense(spec))
    assert spec.description.endswith(".")


@pytest.mark.parametrize("arguments", ["'toy', 'A toy.'", "name=NAME", "nme='toy'"])
def test_a_spec_that_cannot_be_read_names_its_file(arguments: str) -> None:
    with pytest.raises(TypeError, match=r"^toy\.py: SPEC takes literal keyword arguments: "):
        _read_spec(f"SPEC = DefenseSpec({arguments})", "toy.py")


def test_the_catalog_imports_no_torch() -> None:
    script = FACTS + "assert not {'torch', 'numpy', 'transformers'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_the_docs_hold_the_table() -> None:
    page = (DOCS / "robustness.md").read_text()
    assert table() in page, "run `python -m models.defenses.catalog` and put it into the page"


def test_what_needs_a_bundle() -> None:
    assert {n for n, spec in DEFENSES.items() if spec.needs_bundle} == {"apt", "apt-ensemble"}


def test_what_an_attacker_can_unroll_and_must_average_over() -> None:
    assert {n for n, spec in DEFENSES.items() if not spec.random} == {"plain", "apt"}
    unrolled = {n for n, spec in DEFENSES.items() if spec.adapts_prompts}
    assert unrolled == {"tapt", "tpt", "rtpt", "gate", "thrift"}
