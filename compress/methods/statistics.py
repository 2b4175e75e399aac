"""Intervals and tests behind every reported number. Proportions are fractions.

All intervals are two-sided, 95 %, where nothing else is asked for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

CONFIDENCE = 0.95
Z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)


def wilson(correct: int, n: int) -> tuple[float, float]:
    """Score interval of a proportion p = correct / n, as fractions.

    (p + z²/2n ± z √(p(1-p)/n + z²/4n²)) / (1 + z²/n); Wilson, "Probable inference, the law of succession, and
    statistical inference", JASA 22 (1927). Holds p and stays within [0, 1], also for p = 0 and p = 1.

    Args:
        correct: Successes, 0 to `n`.
        n: Trials; 0 says nothing, so the interval is (0, 1).

    Returns:
        Lower and upper end.

    Raises:
        ValueError: where `correct` lies outside 0 to `n`.
    """
    _check_count(correct, n)
    if n == 0:
        return 0.0, 1.0
    p = correct / n
    scale = 1 + Z**2 / n
    centre = (p + Z**2 / (2 * n)) / scale
    half = Z * math.sqrt(p * (1 - p) / n + Z**2 / (4 * n**2)) / scale
    # At p = 0 and p = 1 one end equals p exactly; rounding must not move it past.
    low = 0.0 if correct == 0 else centre - half
    high = 1.0 if correct == n else centre + half
    return low, high


def paired_difference(
    reference_correct: NDArray[np.bool_], other_correct: NDArray[np.bool_], confidence: float = CONFIDENCE
) -> tuple[float, float, float]:
    """Accuracy of `other` minus that of `reference` on the same samples, with its interval, as fractions.

    With b samples that only the reference and c that only the other answers correctly the difference is (c - b) / n.
    Its interval is the adjusted Wald interval for paired proportions of Bonett & Price, "Adjusted Wald confidence
    interval for a difference of binomial proportions based on paired data", Journal of Educational and Behavioral
    Statistics 37 (2012): with p_b = (b + 1) / (n + 2) and p_c = (c + 1) / (n + 2)

        p_c - p_b ± z √((p_c + p_b - (p_c - p_b)²) / (n + 2)),   cut to [-1, 1].

    Args:
        reference_correct: Whether the reference answers each sample correctly, shape `(n,)`.
        other_correct: The same of the other model, in the same order, shape `(n,)`.
        confidence: That the interval holds the difference, 0 or more and below 1; z is its normal quantile.

    Returns:
        Difference, lower and upper end, each within [-1, 1]; (0, -1, 1) without samples.

    Raises:
        ValueError: where the arrays are not boolean vectors of one length.
    """
    assert 0.0 <= confidence < 1.0
    reference, other = np.asarray(reference_correct), np.asarray(other_correct)
    if reference.dtype != np.bool_ or other.dtype != np.bool_:
        raise ValueError(f"both arrays must be boolean, got {reference.dtype} and {other.dtype}")
    if reference.ndim != 1 or reference.shape != other.shape:
        raise ValueError(f"both arrays must be vectors of one length, got {reference.shape} and {other.shape}")
    n = len(reference)
    if n == 0:
        return 0.0, -1.0, 1.0
    only_reference = int(np.count_nonzero(reference & ~other))
    only_other = int(np.count_nonzero(other & ~reference))
    b, c = (only_reference + 1) / (n + 2), (only_other + 1) / (n + 2)
    centre = c - b
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    half = z * math.sqrt((c + b - centre**2) / (n + 2))
    return (only_other - only_reference) / n, max(-1.0, centre - half), min(1.0, centre + half)


def largest_loss(reference_correct: NDArray[np.bool_], other_correct: NDArray[np.bool_], confidence: float) -> float:
    """The accuracy that `other` loses against `reference` at most, with this confidence, as a fraction in [-1, 1].

    A one-sided bound: of the interval of `paired_difference` that leaves 1 - confidence out on either side, the end that
    speaks against `other`. On few samples it lies above 0 even where both answer alike.

    Args:
        reference_correct: As in `paired_difference`.
        other_correct: As in `paired_difference`.
        confidence: 0.5 or more, below 1.

    Raises:
        ValueError: where the arrays are not boolean vectors of one length.
    """
    assert 0.5 <= confidence < 1.0
    return -paired_difference(reference_correct, other_correct, 2 * confidence - 1)[1]


def two_proportions_differ(correct_a: int, n_a: int, correct_b: int, n_b: int) -> float:
    """How surprising two independent proportions are if they are really equal: two-sided pooled z-test.

    z = (p_a - p_b) / √(p(1-p)(1/n_a + 1/n_b)) with p the proportion of both samples together; see e.g. Fleiss, Levin &
    Paik, "Statistical Methods for Rates and Proportions" (2003), section 3.2, without continuity correction.

    Args:
        correct_a: Successes of the first sample, 0 to `n_a`.
        n_a: Its trials.
        correct_b: Successes of the second sample, 0 to `n_b`.
        n_b: Its trials.

    Returns:
        The p-value, 0 to 1; 1 where a sample is empty or nothing varies.

    Raises:
        ValueError: where successes lie outside 0 to the number of trials.
    """
    _check_count(correct_a, n_a)
    _check_count(correct_b, n_b)
    if n_a == 0 or n_b == 0:
        return 1.0
    pooled = (correct_a + correct_b) / (n_a + n_b)
    variance = pooled * (1 - pooled) * (1 / n_a + 1 / n_b)
    if variance == 0.0:
        return 1.0
    z = (correct_a / n_a - correct_b / n_b) / math.sqrt(variance)
    return math.erfc(abs(z) / math.sqrt(2))


def quantile(values: Sequence[float] | NDArray[np.float64], q: float) -> float:
    """The `q`-quantile of values, linear between order statistics (type 7 of Hyndman & Fan 1996).

    Args:
        values: At least one number, in any order.
        q: 0 (the least value) to 1 (the greatest).

    Returns:
        The quantile, in the unit of the values.

    Raises:
        ValueError: where there are no values or `q` lies outside [0, 1].
    """
    if len(values) == 0:
        raise ValueError("a quantile needs at least one value")
    return float(np.quantile(np.asarray(values, dtype=np.float64), q))


def middle_half_mean(values: Sequence[float] | NDArray[np.float64]) -> float:
    """Mean of what is left where a quarter of the values, rounded down, is taken off either end (interquartile mean).

    Almost as robust as the median, and not confined to the values themselves, which may be whole ticks of a clock.

    Args:
        values: At least one number, in any order.

    Returns:
        The mean, in the unit of the values.

    Raises:
        ValueError: where there are no values.
    """
    if len(values) == 0:
        raise ValueError("a mean needs at least one value")
    ordered = np.sort(np.asarray(values, dtype=np.float64))
    cut = len(ordered) // 4
    return float(ordered[cut : len(ordered) - cut].mean())


def median_interval(values: Sequence[float] | NDArray[np.float64]) -> tuple[float, float, float]:
    """Median with its distribution-free interval between two order statistics, in the unit of the values.

    Of n sorted values the k-th from either end enclose the median of the distribution with probability
    1 - 2 P(B < k), B ~ Binomial(n, 1/2); k is the largest that keeps this at 95 % or more, so the interval is
    conservative. Hahn & Meeker, "Statistical Intervals" (1991), section 5.2. It assumes independent values: those taken
    in one burst resemble each other, and the interval then promises too much.

    Args:
        values: At least one number, in any order.

    Returns:
        Median, lower and upper end. Below 6 values no pair reaches 95 %: the ends are then the least and the greatest.

    Raises:
        ValueError: where there are no values.
    """
    if len(values) == 0:
        raise ValueError("a median needs at least one value")
    ordered = np.sort(np.asarray(values, dtype=np.float64))
    rank = _median_rank(len(ordered))
    return float(np.median(ordered)), float(ordered[rank - 1]), float(ordered[-rank])


TELLABLE = 1.05
"""A repeat of the same thing should not look this many times faster or slower than the thing."""
_BIASED = 1.03


def paired_ratio(
    numerator: Sequence[float] | NDArray[np.float64], denominator: Sequence[float] | NDArray[np.float64]
) -> tuple[float, float, float]:
    """Ratio of two things that were measured in pairs, such as in rounds, with its interval.

    Each pair gives a ratio, which whatever slowed both of them leaves alone; of their logarithms `median_interval` is
    taken, so that swapping the two gives the inverse of each number.

    Args:
        numerator: Positive numbers, at least one.
        denominator: As many, in the order of the pairs.

    Returns:
        Median ratio, lower and upper end.

    Raises:
        ValueError: where the two have different lengths, or hold anything but positive finite numbers.
    """
    above, below = np.asarray(numerator, dtype=np.float64), np.asarray(denominator, dtype=np.float64)
    if above.ndim != 1 or above.shape != below.shape:
        raise ValueError(f"both must be vectors of one length, got {above.shape} and {below.shape}")
    if not (np.isfinite(above) & (above > 0) & np.isfinite(below) & (below > 0)).all():
        raise ValueError("a ratio needs positive finite numbers")
    median, low, high = median_interval(np.log(above) - np.log(below))
    return math.exp(median), math.exp(low), math.exp(high)


def tellable_difference(low: float, high: float) -> float:
    """Least difference that can be told where equal things gave a ratio with this interval (A/A), as a fraction.

    It is how far the interval reaches from 1, upwards or downwards: the ratio of two things that differ by less has an
    interval like this one around it, which 1 then lies in. One A/A test estimates it; it promises nothing exact.
    """
    return max(high, 1 / low, 1.0) - 1


def is_noisy_repeat(low: float, high: float) -> bool:
    """Whether a ratio of equal things with this interval (A/A) says that differences of 5 % cannot be told.

    They cannot where the interval reaches further than 5 % from 1; nor where it excludes 1 by more than 3 %: then something
    kept the two apart through all rounds, and may as well hide or feign what another comparison shows.
    """
    return tellable_difference(low, high) > TELLABLE - 1 or low > _BIASED or high < 1 / _BIASED


def _median_rank(n: int) -> int:
    """The largest k >= 1 with P(B < k) <= 2.5 %, B ~ Binomial(n, 1/2); 1 where there is none."""
    # Ratios of neighbours, as logarithms: C(n, i+1) / C(n, i) = (n - i) / (i + 1). The half below the median suffices.
    i = np.arange(n // 2)
    log_mass = np.concatenate(([0.0], np.cumsum(np.log((n - i) / (i + 1.0))))) - n * math.log(2)
    below = np.cumsum(np.exp(log_mass))
    return max(1, int(np.searchsorted(below, (1 - CONFIDENCE) / 2, side="right")))


def _check_count(correct: int, n: int) -> None:
    if not 0 <= correct <= n:
        raise ValueError(f"successes must lie between 0 and the number of trials, got {correct} of {n}")
