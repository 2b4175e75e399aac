"""Learning rates: where they begin, peak and end, and which way they go."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compress.methods.schedules import learning_rate

SCHEDULES = ["one_cycle", "cosine", "constant"]


def rates(schedule, steps):
    return [learning_rate(schedule, step, steps) for step in range(steps)]


@given(st.sampled_from(SCHEDULES), st.integers(1, 300))
def test_every_rate_is_a_positive_part_of_the_peak(schedule, steps):
    assert all(0 < rate <= 1 for rate in rates(schedule, steps))


def test_one_cycle_rises_to_the_peak_and_falls_to_almost_nothing():
    found = rates("one_cycle", 101)
    assert found[0] == pytest.approx(1 / 25)
    assert found[30] == pytest.approx(1)
    assert found[-1] == pytest.approx(1e-4)
    assert found[:31] == sorted(found[:31])
    assert found[30:] == sorted(found[30:], reverse=True)
    assert found[15] == pytest.approx((1 + 1 / 25) / 2)


def test_cosine_only_falls():
    found = rates("cosine", 101)
    assert found[0] == 1
    assert found[50] == pytest.approx((1 + 1e-4) / 2)
    assert found[-1] == pytest.approx(1e-4)
    assert found == sorted(found, reverse=True)


def test_constant_stays():
    assert set(rates("constant", 10)) == {1.0}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_single_step_takes_the_peak(schedule):
    assert rates(schedule, 1) == [1.0]
