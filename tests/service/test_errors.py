"""The errors' page."""

from pathlib import Path

import pytest

from service.errors import ServiceError, Unprocessable, table

DOCUMENT = Path(__file__).parents[2] / "docs/errors.md"
EVERY = ServiceError.__subclasses__()


def test_the_page_is_current() -> None:
    assert DOCUMENT.read_text() == table(), "python -m service.errors > docs/errors.md"


@pytest.mark.parametrize("error", EVERY, ids=lambda error: error.error_type)
def test_every_error_says_what_it_means_and_when_to_retry(error: type[ServiceError]) -> None:
    assert (error.__doc__ or "").endswith(".")
    assert f"| {error.status} | `{error.error_type}` |" in table()
    # What passes by itself comes with the time to wait.
    assert ("Retry-After" in error.retry) == (error.status in (429, 503))


def test_an_image_that_could_not_be_fetched_may_be_sent_again() -> None:
    """The host or its name server may answer the next time."""
    assert "later if the image could not be fetched" in Unprocessable.retry


def test_types_are_distinct() -> None:
    assert len({error.error_type for error in EVERY}) == len(EVERY)
