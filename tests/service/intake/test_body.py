"""Where bodies are parsed: small ones on the event loop, large ones in a thread."""

import asyncio
import threading

import pytest

from service.errors import Unprocessable
from service.intake.body import MAX_VALUES, SMALL_BYTES, SMALL_VALUES, parse, read_json
from service.intake.requests import ClassifyOptions, TextLimits


@pytest.mark.parametrize(
    ("body", "in_a_thread"),
    [
        (b"x" * SMALL_BYTES, False),
        (b"x" * (SMALL_BYTES + 1), True),
        (b"," * SMALL_VALUES, False),
        (b"," * (SMALL_VALUES + 1), True),
    ],
    ids=["small", "many bytes", "few values", "many values"],
)
def test_only_large_bodies_are_parsed_in_a_thread(body: bytes, in_a_thread: bool) -> None:
    def read(given: bytes) -> threading.Thread:
        assert given == body
        return threading.current_thread()

    used = asyncio.run(parse(body, read))
    assert (used is not threading.main_thread()) == in_a_thread


def test_too_many_values_are_refused_before_they_are_parsed() -> None:
    with pytest.raises(Unprocessable, match="more than 50000 values"):
        read_json(ClassifyOptions, b"[" + b"," * (MAX_VALUES + 1), TextLimits())
