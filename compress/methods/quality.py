"""What a classifier's answers are worth beyond top-1: per class, confused with what, how well calibrated, how alike.

Proportions are fractions from 0 to 1. Labels and answers are class numbers from 0.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.integer[Any]]
Bools = NDArray[np.bool_]
Floats = NDArray[np.float64]

TOP = 5
BINS = 15


@dataclass(frozen=True)
class Answers:
    """What of a batch of logits is kept; each of shape (n,)."""

    classes: NDArray[np.int64]
    """The most likely class; of several, the first."""
    confidences: Floats
    """Its softmax probability."""
    in_top: Bools
    """Whether the label is among the `TOP` most likely classes."""


def answers_of(logits: NDArray[Any], labels: Numbers) -> Answers:
    """Answers, their probabilities, and whether the labels are among the most likely classes.

    Classes rank by their logits, equal ones by their number, the lower first: the first in rank is the arg max. NaN ranks
    above everything, as in NumPy's and torch's arg max, and makes the confidence 0.

    Args:
        logits: of any float type, shape (n, classes).
        labels: shape (n,), from 0 to classes - 1.
    """
    values = logits.astype(np.float64)
    values[np.isnan(values)] = np.inf
    classes = values.argmax(1)
    with np.errstate(invalid="ignore"):  # ∞ - ∞
        # The largest term is e⁰ = 1, so that nothing overflows and the sum is at least 1.
        confidences = 1 / np.exp(values - values.max(1, keepdims=True)).sum(1)
    own = np.take_along_axis(values, labels[:, None].astype(np.int64), 1)
    ahead = (values > own).sum(1)
    ties_ahead = ((values == own) & (np.arange(values.shape[1]) < labels[:, None])).sum(1)
    return Answers(classes, np.nan_to_num(confidences, nan=0.0), ahead + ties_ahead < TOP)


@dataclass(frozen=True)
class ClassScores:
    """Precision, recall and F1; of a class where nothing is divided by nothing, that one is 0."""

    precision: Floats
    """Right answers of all answers that name the class, shape (classes,); so are the next two."""
    recall: Floats
    f1: Floats
    counts: NDArray[np.int64]
    """Samples of each class."""
    macro: tuple[float, float, float]
    """Means of the three over the classes that have samples or are answered: one that is neither says nothing."""


def class_scores(labels: Numbers, answers: Numbers, classes: int) -> ClassScores:
    """How each class is answered, by scikit-learn.

    Args:
        labels: shape (n,), n ≥ 1.
        answers: shape (n,).
        classes: number of classes.
    """
    from sklearn.metrics import precision_recall_fscore_support  # takes a second, which a cached run need not wait for

    with warnings.catch_warnings():
        # Few samples of many classes make it ask whether the labels are numbers to regress on.
        warnings.filterwarnings("ignore", "The number of unique classes is greater than", UserWarning)
        precision, recall, f1, counts = precision_recall_fscore_support(
            labels, answers, labels=np.arange(classes), zero_division=0
        )
    occurs = (counts > 0) | (np.bincount(answers, minlength=classes) > 0)
    macro = (float(precision[occurs].mean()), float(recall[occurs].mean()), float(f1[occurs].mean()))
    return ClassScores(precision, recall, f1, counts.astype(np.int64), macro)


def confusion_cells(labels: Numbers, answers: Numbers, classes: int) -> tuple[tuple[int, int, int], ...]:
    """The cells of the confusion matrix that are not zero: class, answer, samples; by class and answer."""
    cells, counts = np.unique(labels.astype(np.int64) * classes + answers, return_counts=True)
    return tuple((int(cell) // classes, int(cell) % classes, int(n)) for cell, n in zip(cells, counts, strict=True))


def calibration_error(confidences: Floats, correct: Bools) -> float:
    """Expected calibration error: how far confidence and accuracy are apart, on average.

    Σ |Bₘ|/n · |acc(Bₘ) - conf(Bₘ)| over `BINS` bins of equal width, Bₘ the samples with confidence in ((m-1)/M, m/M];
    Guo, Pleiss, Sun & Weinberger 2017, "On Calibration of Modern Neural Networks", arXiv:1706.04599, eq. 3. A
    confidence of 0, which no bin holds there, is in the first.

    Args:
        confidences: probabilities of the answers, 0 to 1, shape (n,), n ≥ 1.
        correct: whether they are right, shape (n,).
    """
    edges = np.linspace(0, 1, BINS + 1)[1:-1]
    bins = np.digitize(confidences, edges, right=True)
    # |B|/n · |acc - conf| = |right answers - sum of confidences| / n
    gaps = np.bincount(bins, weights=correct - confidences, minlength=BINS)
    return float(np.abs(gaps).sum() / len(confidences))


def agreement(first: Numbers, second: Numbers) -> float:
    """Fraction of samples with the same answer, right or wrong; both of shape (n,), n ≥ 1."""
    return float(np.mean(first == second))


def mcnemar_p_value(only_first: int, only_second: int) -> float:
    """Exact McNemar test of two classifiers on the same samples, two-sided.

    Of the b + c samples that only one answers right, each is equally likely either's if neither is better: p is
    2 P(X ≤ min(b, c)), X ~ Binomial(b + c, 1/2), at most 1. McNemar, "Note on the sampling error of the difference
    between correlated proportions or percentages", Psychometrika 12 (1947); exact as in Fagerland, Lydersen & Laake
    2013, doi:10.1186/1471-2288-13-91. Numbers below 1e-300 become 0.

    Args:
        only_first: b, samples that only the first answers right, from 0.
        only_second: c, those that only the second does, from 0.

    Raises:
        ValueError: where a count is negative.
    """
    if min(only_first, only_second) < 0:
        raise ValueError(f"counts must be at least 0, got {only_first} and {only_second}")
    n, least = only_first + only_second, min(only_first, only_second)
    # Binomial coefficients overflow, their logarithms do not. The largest mass is that of the least count; those below
    # it follow by C(n, k-1) / C(n, k) = k / (n - k + 1).
    largest = math.lgamma(n + 1) - math.lgamma(least + 1) - math.lgamma(n - least + 1) - n * math.log(2)
    k = np.arange(least, 0, -1)
    tail = 1 + float(np.cumprod(k / (n - k + 1)).sum())
    return min(1.0, 2 * math.exp(largest) * tail)
