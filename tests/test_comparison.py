"""One model against another, where the samples differ or the labels are not at hand, and the Pareto front."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from compress.methods.comparison import (
    independent_difference,
    is_clear_ratio,
    paired_difference_at_most,
    pareto_front,
    tellable_ratio,
)
from compress.methods.statistics import paired_difference


@pytest.mark.parametrize(
    ("a", "n_a", "b", "n_b", "low", "high"),
    [
        (56, 70, 48, 80, 0.0524, 0.3339),
        (9, 10, 3, 10, 0.1705, 0.8090),
        (6, 7, 2, 7, 0.0582, 0.8062),
        (5, 56, 0, 29, -0.0381, 0.1926),
        (0, 10, 0, 20, -0.1611, 0.2775),
        (0, 10, 0, 10, -0.2775, 0.2775),
        (10, 10, 0, 20, 0.6791, 1.0000),
        (10, 10, 0, 10, 0.6075, 1.0000),
    ],
)
def test_independent_differences_are_the_published_ones(a, n_a, b, n_b, low, high):
    """Newcombe 1998, table II, method 10; there it is the first proportion minus the second."""
    difference, found_low, found_high = independent_difference(b, n_b, a, n_a)
    assert difference == pytest.approx(a / n_a - b / n_b)
    assert (found_low, found_high) == pytest.approx((low, high), abs=6e-5)


@given(n_a=st.integers(1, 500), n_b=st.integers(1, 500), data=st.data())
def test_independent_differences_turn_round_and_hold_the_difference(n_a, n_b, data):
    a, b = data.draw(st.integers(0, n_a)), data.draw(st.integers(0, n_b))
    difference, low, high = independent_difference(a, n_a, b, n_b)
    assert -1 <= low <= difference <= high <= 1
    assert independent_difference(b, n_b, a, n_a) == pytest.approx((-difference, -high, -low))


def test_a_loss_of_exactly_a_point_is_not_more():
    assert -100 * independent_difference(993, 1000, 983, 1000)[0] == 1.0
    assert independent_difference(99, 100, 495, 500)[0] == 0.0


@pytest.mark.parametrize("numbers", [(0, 0, 1, 2), (1, 2, 0, 0), (3, 2, 1, 2), (1, 2, -1, 2)])
def test_impossible_counts_are_refused(numbers):
    with pytest.raises(ValueError, match=r"samples|successes"):
        independent_difference(*numbers)


@given(seed=st.integers(0, 10_000), n=st.integers(1, 200), classes=st.integers(2, 6))
def test_without_labels_the_interval_holds_the_one_with_them(seed, n, classes):
    chooser = np.random.default_rng(seed)
    labels = chooser.integers(0, classes, n)
    a, b = (np.where(chooser.random(n) < 0.7, labels, chooser.integers(0, classes, n)) for _ in range(2))
    right_a, right_b = a == labels, b == labels
    exact = paired_difference(right_a, right_b)
    found = paired_difference_at_most(int(right_a.sum()), int(right_b.sum()), int((a != b).sum()), n)
    assert found[0] == pytest.approx(exact[0])
    assert found[1] <= exact[1] + 1e-12
    assert found[2] >= exact[2] - 1e-12
    if not ((a != b) & ~right_a & ~right_b).any():  # each disagreement is won by one of them
        assert found == pytest.approx(exact)


def test_equal_answers_leave_the_least_doubt():
    difference, low, high = paired_difference_at_most(90, 90, 0, 100)
    assert difference == 0.0
    assert (low, high) == pytest.approx(paired_difference(np.ones(100, bool), np.ones(100, bool))[1:])
    assert high < paired_difference_at_most(90, 90, 10, 100)[2] < independent_difference(90, 100, 90, 100)[2]


@pytest.mark.parametrize("numbers", [(9, 5, 3, 10), (5, 5, 11, 10), (11, 5, 6, 10), (-1, 0, 1, 10), (0, 0, 0, 0)])
def test_contradicting_counts_are_refused(numbers):
    with pytest.raises(ValueError, match="cannot differ on"):
        paired_difference_at_most(*numbers)


def test_a_front_by_hand():
    #        best      dominated  cheap     equal to the first  same cost, worse
    costs = [10.0, 20.0, 5.0, 10.0, 5.0]
    values = [99.0, 98.0, 90.0, 99.0, 89.0]
    assert pareto_front(costs, values) == [True, False, True, True, False]
    assert pareto_front([], []) == []
    with pytest.raises(ValueError, match="zip"):
        pareto_front([1.0], [])


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=12))
def test_fronts_are_what_nothing_beats(points):
    costs, values = zip(*points, strict=True)
    front = [point for point, is_on in zip(points, pareto_front(costs, values), strict=True) if is_on]
    assert front
    for cost, value in points:
        # Whatever is not on the front has one on it that costs no more and is worth no less.
        assert any(other_cost <= cost and other_value >= value for other_cost, other_value in front)
    for cost, value in front:
        assert not any(o != (cost, value) and o[0] <= cost and o[1] >= value for o in points)


# --- ratios against what equal things gave ---------------------------------------------------------------------------


def test_a_ratio_is_clear_only_beyond_what_equal_things_gave():
    strayed = (1.012, 1.023)
    assert not is_clear_ratio((1.022, 1.012, 1.023), [strayed])
    assert is_clear_ratio((1.022, 1.012, 1.023), [])
    assert is_clear_ratio((1.03, 1.025, 1.04), [strayed])
    assert not is_clear_ratio((1.03, 0.99, 1.04), [strayed])
    # The furthest of several repeats counts, on whichever side of 1 it lies.
    assert not is_clear_ratio((1.03, 1.025, 1.04), [strayed, (0.96, 1.0)])


@given(
    value=st.floats(0.1, 10.0),
    spread=st.floats(1.0, 1.5),
    repeats=st.lists(st.tuples(st.floats(0.7, 1.0), st.floats(1.0, 1.4)), max_size=3),
)
def test_ratios_turn_round_and_only_widen(value, spread, repeats):
    ratio = (value, value / spread, value * spread)
    found, low, high = tellable_ratio(ratio, repeats)
    assert found == value
    assert low <= ratio[1] <= ratio[2] <= high
    assert tellable_ratio(ratio, []) == ratio
    inverse = (1 / value, 1 / ratio[2], 1 / ratio[1])
    assert tellable_ratio(inverse, repeats) == pytest.approx((1 / value, 1 / high, 1 / low))
    reach = max([1.0, *(max(upper, 1 / lower) for lower, upper in repeats)])
    if is_clear_ratio(ratio, repeats):
        assert max(value, 1 / value) >= reach
        assert not ratio[1] <= 1 <= ratio[2]
