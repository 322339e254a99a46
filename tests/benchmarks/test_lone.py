"""The table of where a lone request's time goes."""

from benchmarks.lone import Spent, write


def test_what_remains_is_the_service() -> None:
    told = {"queue": 0.5, "decode": 2.0, "adapt": 3.0, "predict": 4.0, "total": 11.0}
    spent = Spent(12.0, told)
    assert (spent.outside, spent.rest, spent.service) == (1.0, 1.5, 3.0)
    text = write({"plain": [spent] * 3, "tapt": [spent] * 4}, "python -m benchmarks.lone")
    assert "| **all but decoding and computing** | 3.0 | 3.0 |" in text
    assert "3 requests each" in text
