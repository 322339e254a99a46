"""Numbers on the command line are within their range, or the error names it."""

import argparse
from collections.abc import Callable

import pytest

from models.arguments import number, read_number, whole


@pytest.mark.parametrize(
    ("read", "text", "message"),
    [
        (whole(1), "0", "0 is not a whole number of at least 1"),
        (whole(0), "-1", "-1 is not a whole number of at least 0"),
        (whole(0), "1.5", "1.5 is not a whole number of at least 0"),
        (whole(0), "many", "many is not a whole number of at least 0"),
        (whole(1, 48), "49", "49 is not a whole number from 1 to 48"),
        (number("above 0", lambda n: n > 0), "0", "0 is not a number above 0"),
        (number("above 0", lambda n: n > 0), "nan", "nan is not a number above 0"),
        (number("above 0", lambda n: n > 0), "1e400", "1e400 is not a number above 0"),
        (number("above 0", lambda n: n > 0), "1/0", "1/0 is not a number above 0"),
    ],
)
def test_a_number_out_of_range_is_refused(
    read: Callable[[str], float], text: str, message: str
) -> None:
    with pytest.raises(argparse.ArgumentTypeError) as raised:
        read(text)
    assert str(raised.value) == message


def test_the_ends_of_a_range_belong_to_it() -> None:
    assert [whole(1, 48)(text) for text in ("1", "48")] == [1, 48]
    assert whole(0)("0") == 0


def test_fractions_are_numbers() -> None:
    assert read_number("2/255") == 2 / 255
    assert number("in [0, 1)", lambda n: 0 <= n < 1)("1/255") == 1 / 255
