"""Proportions, paired differences and score comparisons, with intervals."""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, stdev

Z = 1.959964  # of a two-sided 95% interval


@dataclass(frozen=True, slots=True)
class Interval:
    """A figure with its 95% interval."""

    value: float
    low: float
    high: float


def wilson(hits: float, count: int) -> Interval:
    """A proportion (Wilson 1927); `count` is positive, the ends are in [0, 1].

    Where hits are shares of several answers to each image, the interval is wider than needed.
    """
    rate, spread = hits / count, Z * Z / count
    middle = (rate + spread / 2) / (1 + spread)
    half = Z / (1 + spread) * math.sqrt(rate * (1 - rate) / count + spread / count / 4)
    return Interval(rate, max(0.0, middle - half), min(1.0, middle + half))


def difference(first: Sequence[float], second: Sequence[float]) -> Interval:
    """How much more often the first is right than the second, on the same images.

    An image's value is 0 or 1, or its share of right answers. The interval of single answers is
    Newcombe's score interval for paired proportions (Statistics in Medicine 17, 1998, method 10).
    That of shares is Student's, of the images' differences: answers to one image depend on each
    other, and images do not. Shares whose differences are all equal get Newcombe's interval of the
    expected single answers, which is wider.

    Raises:
        ValueError: the two are of different lengths, or empty.
    """
    count = len(first)
    if count != len(second) or not count:
        raise ValueError("a paired difference needs the same images on both sides, and some")
    pairs = list(zip(first, second, strict=True))
    gaps = [a - b for a, b in pairs]
    if not {*first, *second} <= {0, 1} and min(gaps) < max(gaps):
        half = student(count - 1) * stdev(gaps) / math.sqrt(count)
        return Interval(mean(gaps), max(-1.0, mean(gaps) - half), min(1.0, mean(gaps) + half))
    return _newcombe(pairs)


def student(freedom: int) -> float:
    """Student's two-sided 95% quantile for so many degrees of freedom, at least 1, by the expansion
    of Abramowitz and Stegun (26.7.5): within 0.1% from 4 on, too small below."""
    z, v = Z, float(freedom)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / v**power for power, term in enumerate(terms, start=1))


def _newcombe(pairs: Sequence[tuple[float, float]]) -> Interval:
    count = len(pairs)
    both, one = sum(a * b for a, b in pairs), sum(a * (1 - b) for a, b in pairs)
    other, none = sum((1 - a) * b for a, b in pairs), sum((1 - a) * (1 - b) for a, b in pairs)
    a, b = wilson(both + one, count), wilson(both + other, count)
    product = (both + one) * (other + none) * (both + other) * (one + none)
    shared = float(both * none - one * other)
    if shared > 0:
        shared = max(shared - count / 2, 0)
    phi = shared / math.sqrt(product) if product else 0.0

    def reach(x: float, y: float) -> float:
        return math.sqrt(max(0.0, x * x - 2 * phi * x * y + y * y))

    value = (one - other) / count
    low = value - reach(a.value - a.low, b.high - b.value)
    return Interval(value, low, value + reach(a.high - a.value, b.value - b.low))


def auroc(attacked: Sequence[float], clean: Sequence[float]) -> float:
    """How often an attacked image's score is above a clean one's; ties count half.

    Raises:
        ValueError: one of the two is empty.
    """
    if not attacked or not clean:
        raise ValueError("a comparison of scores needs some on both sides")
    ordered = sorted(clean)
    below = sum(bisect_left(ordered, score) + bisect_right(ordered, score) for score in attacked)
    return below / 2 / len(attacked) / len(clean)


def threshold(clean: Sequence[float], rate: float) -> float:
    """The smallest score with at most this share of clean images above it."""
    return sorted(clean, reverse=True)[int(rate * len(clean))]
