"""Request bodies to validated options: JSON here, forms in `multipart`."""

import asyncio
import codecs
from collections.abc import Callable
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from service.errors import BadRequest, ServiceError, Unprocessable
from service.intake.requests import TextLimits
from service.texts import describe_json

MAX_VALUES = 50_000
"""Values in one request, counted by their commas before parsing: a parsed value takes many times
the memory of its text. Base64 holds no commas."""

SMALL_BYTES, SMALL_VALUES = 2**18, 1024
"""Bodies up to this size are parsed within a millisecond or two. Waking a thread takes about
0.1 ms, as long as parsing a typical body."""

_OTHER_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)

M = TypeVar("M", bound=BaseModel)
T = TypeVar("T")


async def parse(body: bytes, read: Callable[[bytes], T]) -> T:
    """Return `read(body)`. Large bodies are read in a thread, so that they do not delay others."""
    if len(body) <= SMALL_BYTES and body.count(b",") <= SMALL_VALUES:
        return read(body)
    return await asyncio.to_thread(read, body)


def read_json(model: type[M], body: bytes, limits: TextLimits) -> M:
    """Parse and validate a JSON body.

    A UTF-8 byte order mark is skipped. Raises BadRequest if the body is not JSON, Unprocessable if
    it does not fit the model or holds more than MAX_VALUES values.
    """
    body = body.removeprefix(codecs.BOM_UTF8)
    if not body.lstrip().startswith(b"-"):  # a form sent without its content type
        check_value_count(body)
    try:
        return model.model_validate_json(body, context=limits)
    except ValidationError as error:
        raise _translate(error, body) from None


def validate(model: type[M], fields: object, limits: TextLimits) -> M:
    """Validate parsed fields. Raises Unprocessable."""
    try:
        return model.model_validate(fields, context=limits)
    except ValidationError as error:
        raise _translate(error) from None


def check_value_count(text: bytes) -> None:
    """Raises Unprocessable for more than MAX_VALUES values."""
    if text.count(b",") > MAX_VALUES:
        raise Unprocessable(f"The request holds more than {MAX_VALUES} values.")


def _describe_body(body: bytes, problem: str) -> str:
    if body.startswith(_OTHER_MARKS) or b"\0" in body[:4]:  # RFC 4627, section 3
        return "The body is UTF-16 or UTF-32; send UTF-8."
    start = body[:64].lstrip()
    if start.startswith(b"--"):
        return (
            "The body looks like a form, but its Content-Type is not "
            "`multipart/form-data; boundary=...`."
        )
    if start.startswith((b"{", b"[")):
        return f"The body {describe_json(problem)}."
    return "The body is neither JSON nor a multipart form."


def _translate(error: ValidationError, body: bytes = b"") -> ServiceError:
    """The first problem that pydantic found, as one sentence without the client's input."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    field = ".".join(map(str, first["loc"]))
    match first["type"]:
        case "json_invalid":
            problem = first["msg"].removeprefix("Invalid JSON: ")
            return BadRequest(_describe_body(body, problem))
        case "json_list":
            return BadRequest(f"The field `{field}` {first['msg']}.")
        case "extra_forbidden":
            return Unprocessable(f"The field `{field[:64]}` is unknown.")
        case "missing":
            return Unprocessable(f"The field `{field}` is missing.")
        case "text_limit":
            return Unprocessable(f"{first['msg']}.")
    problem = first["msg"].removeprefix("Value error, ")
    return Unprocessable(f"`{field}`: {problem}." if field else f"{problem}.")
