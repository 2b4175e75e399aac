"""One model against another: differences of accuracy from what is known of the answers, and the Pareto front.

All intervals are two-sided, 95 %; proportions and differences are fractions.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from compress.methods.statistics import Z, tellable_difference, wilson

Interval = tuple[float, float, float]
"""Difference or ratio, lower and upper end."""


def independent_difference(correct_a: int, n_a: int, correct_b: int, n_b: int) -> Interval:
    """Accuracy of B minus that of A, each measured on samples of its own, with its interval.

    Newcombe's hybrid score interval (method 10), from the Wilson intervals (l, u) of the two proportions:

        d - √((p_b - l_b)² + (u_a - p_a)²)   to   d + √((u_b - p_b)² + (p_a - l_a)²),   d = p_b - p_a

    Newcombe, "Interval estimation for the difference between independent proportions: comparison of eleven methods",
    Statistics in Medicine 17 (1998). On the same samples, where errors coincide, it is wider than a paired one.

    Args:
        correct_a: Right answers of A, 0 to `n_a`.
        n_a: Samples of A, from 1.
        correct_b: Right answers of B, 0 to `n_b`.
        n_b: Samples of B, from 1.

    Raises:
        ValueError: where a number lies outside its range.
    """
    if min(n_a, n_b) < 1:
        raise ValueError(f"both need samples, got {n_a} and {n_b}")
    (low_a, high_a), (low_b, high_b) = wilson(correct_a, n_a), wilson(correct_b, n_b)
    a, b = correct_a / n_a, correct_b / n_b
    # One division of whole numbers: 7 of 1,000 less are 0.007, not a rounding error more.
    difference = (correct_b * n_a - correct_a * n_b) / (n_a * n_b)
    low = difference - math.hypot(b - low_b, high_a - a)
    high = difference + math.hypot(high_b - b, a - low_a)
    return difference, max(-1.0, low), min(1.0, high)


def paired_difference_at_most(correct_a: int, correct_b: int, disagreements: int, n: int) -> Interval:
    """Accuracy of B minus that of A on the same samples, where the right answers themselves are not at hand.

    Only samples that the two answer differently can be right for one and wrong for the other, and of these b are A's and
    c are B's: c - b is known, and b + c is at most the number of disagreements; the rest are samples that both get wrong,
    differently. The interval is that of `compress.methods.statistics.paired_difference` (Bonett & Price 2012) with the
    largest b + c that is possible. It grows with b + c, so that it holds the one that the labels would give.

    Args:
        correct_a: Right answers of A, 0 to `n`.
        correct_b: Right answers of B, 0 to `n`.
        disagreements: Samples with different answers, from |correct_a - correct_b| to `n`.
        n: Samples, from 1.

    Raises:
        ValueError: where the numbers contradict each other.
    """
    gained = correct_b - correct_a
    if not (0 <= correct_a <= n and 0 <= correct_b <= n and abs(gained) <= disagreements <= n and n >= 1):
        raise ValueError(f"{correct_a} and {correct_b} right of {n} cannot differ on {disagreements} samples")
    # b + c has the parity of c - b; and where both are right on much, few are left to be won by one alone.
    most = min(disagreements, correct_a + correct_b, 2 * n - correct_a - correct_b)
    most -= (most - gained) % 2
    centre = gained / (n + 2)
    half = Z * math.sqrt(((most + 2) / (n + 2) - centre**2) / (n + 2))
    return gained / n, max(-1.0, centre - half), min(1.0, centre + half)


def tellable_ratio(ratio: Interval, repeats: Iterable[tuple[float, float]]) -> Interval:
    """A ratio whose interval reaches at least as far as that of equal things did (A/A).

    An interval tells what the rounds of one measurement say; two processes of the same thing can differ a little through
    all of them. So with d the largest `tellable_difference` of the repeats the ends are at most r / (1 + d) and at least
    r (1 + d): the interval leaves 1 out only where it did so before and r differs from 1 by more than d.

    Args:
        ratio: r and its interval, positive.
        repeats: Lower and upper end of the ratio of equal things, each; none leave the interval as it is.
    """
    value, low, high = ratio
    reach = 1 + max((tellable_difference(*repeat) for repeat in repeats), default=0.0)
    return value, min(low, value / reach), max(high, value * reach)


def is_clear_ratio(ratio: Interval, repeats: Iterable[tuple[float, float]]) -> bool:
    """Whether one of two things is larger: whether 1 lies outside of their ratio's interval, that of `tellable_ratio`."""
    _, low, high = tellable_ratio(ratio, repeats)
    return low > 1 or high < 1


def pareto_front(costs: Sequence[float], values: Sequence[float]) -> list[bool]:
    """Whether each of several things is on the Pareto front: none costs no more and is worth no less, and differs.

    Args:
        costs: Less is better, shape (n,).
        values: More is better, shape (n,).

    Returns:
        In their order; equal things are on it together.

    Raises:
        ValueError: where the two have different lengths.
    """
    pairs = list(zip(costs, values, strict=True))
    return [
        not any(other != (cost, value) and other[0] <= cost and other[1] >= value for other in pairs)
        for cost, value in pairs
    ]
