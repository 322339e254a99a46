"""Options that the commands of this package share."""

from fractions import Fraction


def read_number(text: str) -> float:
    """A number, or a fraction such as 2/255. Raises ValueError."""
    try:
        return float(Fraction(text))
    except ZeroDivisionError as error:
        raise ValueError(str(error)) from error
