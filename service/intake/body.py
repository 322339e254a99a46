"""Request bodies to validated options: JSON here, forms in `multipart`."""

import asyncio
from collections.abc import Callable
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from service.errors import BadRequest, ServiceError, Unprocessable
from service.intake.requests import TextLimits

MAX_VALUES = 50_000
"""Values in one request, counted by their commas before parsing: a parsed value takes many times
the memory of its text. Base64 holds no commas."""

SMALL_BYTES, SMALL_VALUES = 2**18, 1024
"""Bodies up to this size are parsed within a millisecond or two. Waking a thread takes about
0.1 ms, as long as parsing a typical body."""

M = TypeVar("M", bound=BaseModel)
T = TypeVar("T")


async def parse(body: bytes, read: Callable[[bytes], T]) -> T:
    """Return `read(body)`. Large bodies are read in a thread, so that they do not delay others."""
    if len(body) <= SMALL_BYTES and body.count(b",") <= SMALL_VALUES:
        return read(body)
    return await asyncio.to_thread(read, body)


def read_json(model: type[M], body: bytes, limits: TextLimits) -> M:
    """Parse and validate a JSON body.

    Raises BadRequest if the body is not JSON, Unprocessable if it does not fit the model or holds
    more than MAX_VALUES values.
    """
    if not body.lstrip().startswith(b"-"):  # a form sent without its content type
        check_value_count(body)
    try:
        return model.model_validate_json(body, context=limits)
    except ValidationError as error:
        raise _translate(error) from None


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


def _translate(error: ValidationError) -> ServiceError:
    """The first problem that pydantic found, as one sentence without the client's input."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    field = ".".join(map(str, first["loc"]))
    match first["type"]:
        case "json_invalid":
            return BadRequest("The body is neither JSON nor a multipart form.")
        case "extra_forbidden":
            return Unprocessable(f"The field `{field[:64]}` is unknown.")
        case "missing":
            return Unprocessable(f"The field `{field}` is missing.")
        case "text_limit":
            return Unprocessable(f"{first['msg']}.")
    problem = first["msg"].removeprefix("Value error, ")
    return Unprocessable(f"`{field}`: {problem}." if field else f"{problem}.")
