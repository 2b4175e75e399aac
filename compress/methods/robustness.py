"""Means of accuracy over several conditions on the same samples, and their intervals.

The answers to one image under several corruptions resemble each other, so that they do not count as so many samples: what
is counted is the share of conditions under which an image is answered right. All intervals are two-sided, 95 %; all values
are fractions.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from compress.methods.comparison import Interval
from compress.methods.statistics import Z

Shares = NDArray[np.float64]
"""Of each sample, (n,), the share of conditions under which it is answered right, 0 to 1."""


def mean_share(shares: Shares) -> Interval:
    """Mean over the samples with its interval.

    As the adjusted interval of Agresti & Coull, "Approximate is better than 'exact' for interval estimation of binomial
    proportions", The American Statistician 52 (1998): z²/2 samples that are always right and z²/2 that never are come to
    the n given ones, and of all of them the normal interval of the mean is taken. With one condition it is theirs.

    Raises:
        ValueError: where there are no samples, or a share lies outside 0 to 1.
    """
    if len(shares) == 0 or shares.min() < 0 or shares.max() > 1:
        raise ValueError("needs at least one share, all within 0 to 1")
    n = len(shares) + Z**2
    centre = (float(shares.sum()) + Z**2 / 2) / n
    variance = (float((shares**2).sum()) + Z**2 / 2) / n - centre**2
    half = Z * math.sqrt(max(variance, 0.0) / n)
    return float(shares.mean()), max(0.0, centre - half), min(1.0, centre + half)


def mean_difference(reference: Shares, other: Shares) -> Interval:
    """Mean of the other minus that of the reference on the same samples, with its interval.

    As `compress.methods.statistics.paired_difference` (Bonett & Price 2012), which it is with one condition: a sample that
    only the one and a sample that only the other answers right come to the n given ones, and of the differences of all of
    them the normal interval of the mean is taken.

    Raises:
        ValueError: where there are no samples, or not the same number of both.
    """
    if reference.ndim != 1 or reference.shape != other.shape or len(reference) == 0:
        raise ValueError(f"both must be vectors of one length, from 1, got {reference.shape} and {other.shape}")
    differences = other - reference
    n = len(differences) + 2
    centre = float(differences.sum()) / n
    variance = (float((differences**2).sum()) + 2) / n - centre**2
    half = Z * math.sqrt(max(variance, 0.0) / n)
    return float(differences.mean()), max(-1.0, centre - half), min(1.0, centre + half)
