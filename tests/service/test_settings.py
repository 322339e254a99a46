"""The settings: their table, their sources, their mistakes."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from service.settings import Settings, table, unknown_variables

DOCUMENT = Path(__file__).parents[2] / "docs" / "configuration.md"


def test_the_documented_table_equals_the_code() -> None:
    assert DOCUMENT.read_text() == table()  # python -m service.settings


def test_the_table_names_the_words_that_a_knob_takes() -> None:
    lines = {line.split("`")[1]: line for line in table().splitlines() if line.startswith("| `")}
    assert lines["TAPT_EXPOSE"].endswith("One of `full`, `rounded`, `label`. |")
    assert "One of" not in lines["TAPT_HOST"]


def test_every_knob_is_described() -> None:
    for name, field in Settings.model_fields.items():
        assert field.description, name
        assert field.description.endswith("."), name
        assert "|" not in field.description, name


def test_variables_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TAPT_MAX_VIEWS", "128")
    monkeypatch.setenv("TAPT_ALLOW_CLIENT_SEED", "true")
    monkeypatch.setenv("TAPT_API_KEYS", " alpha, beta,,")
    settings = Settings()
    assert settings.max_views == 128
    assert settings.allow_client_seed
    assert settings.api_keys == ("alpha", "beta")
    assert "alpha" not in repr(settings)
    monkeypatch.setenv("TAPT_API_KEYS", ",")  # how compose.yaml is told that there are none
    assert Settings().api_keys == ()


@pytest.mark.parametrize(
    "given",
    [
        {"steps": 9, "max_steps": 8},
        {"views": 65},
        {"hypothesis_template": "a photo"},
        {"hypothesis_template": "{x} {}"},
        {"gamma": 1.5},
        {"port": 70000},
        {"colour": "red"},
    ],
)
def test_settings_that_make_no_sense_are_refused(given: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        Settings(**given)


def test_unknown_variables_are_found() -> None:
    environ = {"TAPT_PORT": "1", "TAPT_PROT": "1", "tapt_x": "", "HOME": "/", "TAPTI": ""}
    assert unknown_variables(environ) == ["TAPT_PROT", "tapt_x"]
