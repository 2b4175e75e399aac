"""What answers are worth, against independent formulas."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.special import softmax
from scipy.stats import binomtest
from sklearn.metrics import confusion_matrix, f1_score, precision_score, recall_score

from compress.methods.quality import (
    BINS,
    agreement,
    answers_of,
    calibration_error,
    class_scores,
    confusion_cells,
    mcnemar_p_value,
)

# Few different values, so that ties are common.
LOGITS = st.tuples(st.integers(1, 6), st.integers(1, 9)).flatmap(
    lambda shape: arrays(np.float32, shape, elements=st.integers(-3, 3).map(float))
)
PREDICTIONS = st.integers(1, 8).flatmap(
    lambda classes: st.tuples(
        st.lists(st.tuples(*[st.integers(0, classes - 1)] * 2), min_size=1, max_size=60).map(np.array), st.just(classes)
    )
)
CONFIDENT = st.lists(
    st.tuples(st.one_of(st.floats(0, 1), st.integers(0, BINS).map(lambda m: m / BINS)), st.booleans()),
    min_size=1,
    max_size=60,
)


# Answers


@given(LOGITS, st.data())
def test_answers_follow_a_stable_order_of_the_logits(logits, data):
    n, classes = logits.shape
    labels = np.array(data.draw(st.lists(st.integers(0, classes - 1), min_size=n, max_size=n)))
    found = answers_of(logits, labels)
    order = np.argsort(-logits, axis=1, kind="stable")
    assert np.array_equal(found.classes, order[:, 0])
    assert np.array_equal(found.classes, logits.argmax(1))
    assert found.in_top.tolist() == [label in row[:5] for label, row in zip(labels, order, strict=True)]
    np.testing.assert_allclose(found.confidences, softmax(logits.astype(np.float64), axis=1).max(1), rtol=1e-12)


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64])
def test_the_confidence_of_huge_logits_is_a_probability(kind):
    logits = np.array([[6e4, -6e4, 0.0], [-6e4, -6e4, -6e4], [-np.inf, 1.0, 1.0]], kind)
    found = answers_of(logits, np.array([0, 1, 2]))
    assert found.classes.tolist() == [0, 0, 1]
    assert found.confidences == pytest.approx([1, 1 / 3, 1 / 2])


def test_what_is_not_a_number_is_answered_without_confidence():
    logits = np.array([[0.0, np.nan, 9.0, 1.0, 2.0, 3.0], [np.inf, 0.0, 0.0, np.inf, 0.0, 0.0]])
    found = answers_of(logits, np.array([0, 3]))
    assert found.classes.tolist() == logits.argmax(1).tolist() == [1, 0]
    assert found.confidences.tolist() == [0.0, 0.0]
    assert found.in_top.tolist() == [False, True]
    assert np.isnan(logits[0, 1]), "the logits are the caller's"


# Classes


@given(PREDICTIONS)
def test_scores_are_the_ratios_of_counts(predictions):
    pairs, classes = predictions
    labels, answers = pairs[:, 0], pairs[:, 1]
    found = class_scores(labels, answers, classes)
    for number in range(classes):
        right = int(((labels == number) & (answers == number)).sum())
        named, there = int((answers == number).sum()), int((labels == number).sum())
        assert found.counts[number] == there
        assert found.precision[number] == pytest.approx(right / named if named else 0)
        assert found.recall[number] == pytest.approx(right / there if there else 0)
        assert found.f1[number] == pytest.approx(2 * right / (named + there) if named + there else 0)
    averages = [
        score(labels, answers, average="macro", zero_division=0) for score in (precision_score, recall_score, f1_score)
    ]
    assert found.macro == pytest.approx(averages)


def test_classes_that_nothing_is_known_of_cost_nothing():
    labels = np.array([0, 2, 2])
    found = class_scores(labels, labels, 5)
    assert found.macro == (1.0, 1.0, 1.0)
    assert found.counts.tolist() == [1, 0, 2, 0, 0]
    # One that has samples but is never answered counts, and so does one that is answered wrongly.
    assert class_scores(np.array([0, 1]), np.array([0, 2]), 5).macro == pytest.approx((1 / 3, 1 / 3, 1 / 3))


def test_few_samples_of_many_classes_raise_no_warning():
    labels = np.arange(40)
    assert class_scores(labels, labels[::-1].copy(), 1000).macro == (0.0, 0.0, 0.0)


@given(PREDICTIONS.filter(lambda predictions: predictions[1] > 1))
def test_cells_make_up_the_confusion_matrix(predictions):
    pairs, classes = predictions
    cells = confusion_cells(pairs[:, 0], pairs[:, 1], classes)
    matrix = np.zeros((classes, classes), int)
    for label, answer, n in cells:
        assert n > 0
        matrix[label, answer] += n
    assert np.array_equal(matrix, confusion_matrix(pairs[:, 0], pairs[:, 1], labels=range(classes)))
    assert list(cells) == sorted(cells)


# Calibration


@given(CONFIDENT)
def test_the_calibration_error_is_the_papers_sum(samples):
    expected = 0.0
    for m in range(1, BINS + 1):
        inside = [(c, hit) for c, hit in samples if (m - 1) / BINS < c <= m / BINS or (m == 1 and c == 0)]
        if inside:
            accuracy = sum(hit for _, hit in inside) / len(inside)
            confidence = sum(c for c, _ in inside) / len(inside)
            expected += len(inside) / len(samples) * abs(accuracy - confidence)
    found = calibration_error(np.array([c for c, _ in samples]), np.array([hit for _, hit in samples]))
    assert found == pytest.approx(expected, abs=1e-12)
    assert 0 <= found <= 1


def test_bins_are_closed_on_the_right():
    # 3/15 ends its bin and 0.25 lies in the next; were they in one, their gaps would cancel in part.
    found = calibration_error(np.array([3 / 15, 0.25]), np.array([True, False]))
    assert found == pytest.approx((0.8 + 0.25) / 2)


def test_certainty_that_is_right_is_calibrated_and_that_is_wrong_is_not():
    sure = np.ones(7)
    assert calibration_error(sure, np.ones(7, bool)) == 0
    assert calibration_error(sure, np.zeros(7, bool)) == 1


# Two models


@given(PREDICTIONS)
def test_agreement_counts_equal_answers(predictions):
    pairs, _ = predictions
    assert agreement(pairs[:, 0], pairs[:, 1]) == pytest.approx(sum(a == b for a, b in pairs.tolist()) / len(pairs))


@given(st.integers(0, 40), st.integers(0, 40))
def test_mcnemar_is_the_exact_binomial_tail(b, c):
    tail = sum(math.comb(b + c, k) for k in range(min(b, c) + 1))
    exact = min(Fraction(1), Fraction(2 * tail, 2 ** (b + c)))
    assert mcnemar_p_value(b, c) == pytest.approx(float(exact), rel=1e-12)
    assert mcnemar_p_value(b, c) == mcnemar_p_value(c, b)


@pytest.mark.parametrize(("b", "c"), [(0, 0), (10, 2), (121, 59), (500_000, 502_000), (3_000_000, 3_000_001)])
def test_mcnemar_agrees_with_scipy(b, c):
    expected = binomtest(b, b + c).pvalue if b + c else 1.0
    assert mcnemar_p_value(b, c) == pytest.approx(expected, rel=1e-6)


def test_mcnemar_survives_counts_whose_coefficients_overflow():
    assert mcnemar_p_value(0, 10_000_000) == 0
    assert mcnemar_p_value(1_000_000, 3_000_000) == 0
    assert mcnemar_p_value(2_000_000, 2_000_000) == 1
    assert 0 < mcnemar_p_value(0, 1000) < 1e-300
    with pytest.raises(ValueError, match="at least 0, got -1 and 3"):
        mcnemar_p_value(-1, 3)


@given(st.integers(0, 200), st.integers(0, 200))
def test_mcnemar_falls_as_the_split_grows_more_uneven(b, c):
    if b > 0 and b <= c:
        assert mcnemar_p_value(b - 1, c + 1) < mcnemar_p_value(b, c)
    assert 0 < mcnemar_p_value(b, c) <= 1
