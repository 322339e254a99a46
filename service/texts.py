"""Checks of texts that settings and requests share: hidden characters, templates, JSON lists."""

import re
from typing import Any

from pydantic_core import PydanticCustomError, from_json

# Control characters other than white space, and bidirectional embeddings, overrides and isolates,
# which make a text look like another one.
HIDDEN = re.compile(r"[\x00-\x08\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")

_LIST_OF_STRINGS = re.compile(r'\s*\[\s*"')


def read_templates(value: Any) -> list[Any]:
    """The templates in a string or a list. A string that holds a JSON array of strings is several;
    `[{}]` is a template. Raises ValueError if the value is neither."""
    if isinstance(value, str):
        value = read_list(value) if _LIST_OF_STRINGS.match(value) else [value]
    if not isinstance(value, list | tuple):
        raise ValueError("a template is a string, and several are a list of strings")
    return list(value)


def check_template(template: str) -> None:
    """Raises ValueError unless the template has exactly one `{}`, no other brace and no hidden
    character."""
    if HIDDEN.search(template):
        raise ValueError("a template holds a control character")
    if template.count("{}") != 1 or "{" in (rest := template.replace("{}", "")) or "}" in rest:
        raise ValueError("a template holds exactly one {} and no other brace")


def read_list(text: str) -> Any:
    """A JSON array that was sent inside a string. Raises PydanticCustomError, a ValueError."""
    try:
        return from_json(text)
    except ValueError as error:
        message = describe_json(str(error))
        raise PydanticCustomError("json_list", "{problem}", {"problem": message}) from None


def describe_json(problem: str) -> str:
    """A parser's message as the end of a sentence, without the client's input.

    Half of a surrogate pair comes from a program that cut a string in the middle of a character.
    """
    if "surrogate" in problem or "end of hex escape" in problem:
        place = problem[problem.rfind(" at line") :]
        return f"holds half of a surrogate pair{place}, which is not a character"
    return f"is not valid JSON: {problem}"
