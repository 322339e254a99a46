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


@pytest.mark.parametrize("template", ["a photo of a {}.", "[{}]", "[ {} ]", "a photo, {}"])
def test_one_template_stays_as_it_is(monkeypatch: pytest.MonkeyPatch, template: str) -> None:
    monkeypatch.setenv("TAPT_HYPOTHESIS_TEMPLATE", template)
    assert Settings().hypothesis_template == template
    assert Settings().templates == (template,)


@pytest.mark.parametrize("text", ['["a {}.", "the {}"]', '\n [\n "a {}.",\n "the {}"\n]\n'])
def test_a_json_array_is_several_templates(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("TAPT_HYPOTHESIS_TEMPLATE", text)
    settings = Settings()
    assert settings.hypothesis_template == settings.templates == ("a {}.", "the {}")
    assert Settings(hypothesis_template=["a {}.", "the {}"]) == settings
    assert Settings(hypothesis_template='["a {}."]').hypothesis_template == "a {}."


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"hypothesis_template": '["a {}", "b"]'}, "exactly one {}"),
        ({"hypothesis_template": '["a {}", "b {} }"]'}, "no other brace"),
        ({"hypothesis_template": '["a {}", "b \\u202e {}"]'}, "control character"),
        ({"hypothesis_template": "b \x00 {}"}, "control character"),
        ({"hypothesis_template": '["a {}", 5]'}, "a template is a string"),
        ({"hypothesis_template": '["a {}", "b {}"'}, "is not valid JSON"),
        ({"hypothesis_template": []}, "at least one template"),
        ({"hypothesis_template": 5}, "a template is a string"),
        ({"hypothesis_template": ["a {}"] * 501}, r"501 templates .* max_labels \(1000\)"),
        ({"hypothesis_template": ["a {}"] * 3, "max_labels": 5}, r"3 templates .* \(5\)"),
        ({"hypothesis_template": ["a {}", "b" * 255 + "{}"]}, r"max_label_chars \(256\)"),
    ],
)
def test_several_templates_have_the_checks_and_limits_of_a_request(
    given: dict[str, object], sentence: str
) -> None:
    with pytest.raises(ValidationError, match=sentence) as caught:
        Settings(**given)
    (problem,) = caught.value.errors()
    assert problem["loc"] in ((), ("hypothesis_template",))  # what the command names
    Settings(hypothesis_template=["a {}"] * 500)


def test_unknown_variables_are_found() -> None:
    environ = {"TAPT_PORT": "1", "TAPT_PROT": "1", "tapt_x": "", "HOME": "/", "TAPTI": ""}
    assert unknown_variables(environ) == ["TAPT_PROT", "tapt_x"]
