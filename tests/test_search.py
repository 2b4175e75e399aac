"""Bisection along an axis: few trials, the strongest value that passed, never one that failed."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compress.methods.search import DIGITS, Axis, Trial, next_value, search

UNIT = 10.0**-DIGITS
INSIDE = st.floats(0.001, 0.999)
AXES = st.builds(Axis, st.sampled_from([0.0, 1.0]), INSIDE)
TRIALS = st.integers(1, 15)


def within(axis, limit):
    """An oracle for which all up to a strength pass."""
    return lambda value: axis.strength(value) <= limit


def strongest(axis, tried):
    passed = [trial.value for trial in tried if trial.passed]
    return axis.strongest_first(passed)[0] if passed else axis.nothing


@given(AXES, st.floats(0, 1), TRIALS)
def test_it_finds_the_strongest_that_passes_as_closely_as_its_trials_allow(axis, limit, trials):
    tried = search(axis, within(axis, limit), trials)
    found, width = axis.strength(strongest(axis, tried)), abs(axis.target - axis.nothing)
    assert found <= limit
    if limit < 1:
        # Roundings of half a unit add up to less than one; a gap of two units may have no value between.
        assert (limit - found) * width <= width / 2 ** (trials - 1) + 3 * UNIT
    else:
        assert tried == (Trial(axis.target, True),)


@given(AXES, st.randoms(use_true_random=False), TRIALS)
def test_whatever_the_oracle_says_trials_are_few_new_readable_and_between(axis, random, trials):
    answers = {}

    def passes(value):
        assert value not in answers
        answers[value] = random.random() < 0.5
        return answers[value]

    tried = search(axis, passes, trials)
    assert 1 <= len(tried) <= trials
    assert tried == tuple(Trial(*item) for item in answers.items())
    assert tried[0].value == axis.target
    for trial in tried[1:]:
        assert 0 < axis.strength(trial.value) < 1
        assert round(trial.value, DIGITS) == trial.value
    assert answers.get(strongest(axis, tried), True)


def test_a_search_goes_on_from_what_was_tried():
    axis = Axis(1.0, 0.2)
    assert next_value(axis, []) == 0.2
    assert next_value(axis, [Trial(0.2, True)]) is None
    tried = [Trial(0.2, False), Trial(0.6, True)]
    assert next_value(axis, tried) == 0.4
    assert next_value(axis, [*tried, Trial(0.4, False)]) == 0.5


@pytest.mark.parametrize(("nothing", "order"), [(1.0, [0.2, 0.5, 0.9]), (0.0, [0.9, 0.5, 0.2])])
def test_strength_has_the_direction_of_the_axis(nothing, order):
    axis = Axis(nothing, order[0])
    assert axis.strongest_first([0.5, order[2], order[0]]) == order
    assert (axis.strength(nothing), axis.strength(order[0])) == (0, 1)


def test_nothing_is_left_between_neighbours():
    assert next_value(Axis(1.0, 0.999), [Trial(0.999, False)]) is None
    assert [trial.value for trial in search(Axis(0.0, 0.004), lambda value: False, 9)] == [0.004, 0.002, 0.001]
