"""Types of command-line arguments for `argparse`: numbers within a range."""

import argparse
from collections.abc import Callable
from contextlib import suppress
from fractions import Fraction


def read_number(text: str) -> float:
    """A number, or a fraction such as 2/255. Raises ValueError."""
    try:
        return float(Fraction(text))
    except (ZeroDivisionError, OverflowError) as error:
        raise ValueError(str(error)) from error


def whole(least: int, most: int | None = None) -> Callable[[str], int]:
    """The type of a whole number in a range, ends included."""
    span = f"of at least {least}" if most is None else f"from {least} to {most}"

    def read(text: str) -> int:
        with suppress(ValueError):
            found = int(text)
            if found >= least and (most is None or found <= most):
                return found
        raise argparse.ArgumentTypeError(f"{text} is not a whole number {span}")

    return read


def number(name: str, allowed: Callable[[float], bool]) -> Callable[[str], float]:
    """The type of a number or fraction for which `allowed` holds; `name` says which these are, for
    errors, such as `in [0, 1)`."""

    def read(text: str) -> float:
        with suppress(ValueError):
            if allowed(found := read_number(text)):
                return found
        raise argparse.ArgumentTypeError(f"{text} is not a number {name}")

    return read
