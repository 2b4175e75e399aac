"""Learning rates and other schedules: where they begin, peak and end, and which way they go."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compress.methods.schedules import learning_rate, scheduled

SCHEDULES = ["one_cycle", "cosine", "step", "constant"]
DOWN = {"milestones": (0.5, 0.75), "gamma": 0.1}


def rates(schedule, steps, **settings):
    return [learning_rate(schedule, step, steps, **settings) for step in range(steps)]


@given(st.sampled_from(SCHEDULES), st.integers(1, 300), st.floats(0, 0.99))
def test_every_rate_is_a_positive_part_of_the_peak(schedule, steps, warm_up):
    assert all(0 < rate <= 1 for rate in rates(schedule, steps, warm_up=warm_up, **DOWN))


def before(schedule, step, steps):
    """The formulas as they were before there was a warm-up."""

    def between(start, end, position):
        return end + (start - end) * (1 + math.cos(math.pi * position)) / 2

    if schedule == "constant" or steps <= 1:
        return 1.0
    position = step / (steps - 1)
    if schedule == "cosine":
        return between(1.0, 1e-4, position)
    if position < 0.3:
        return between(1 / 25, 1.0, position / 0.3)
    return between(1.0, 1e-4, (position - 0.3) / 0.7)


@pytest.mark.parametrize("schedule", ["one_cycle", "cosine", "constant"])
@pytest.mark.parametrize("steps", [1, 2, 7, 101, 1000])
def test_without_warm_up_the_numbers_of_earlier_versions_stay(schedule, steps):
    assert rates(schedule, steps) == [before(schedule, step, steps) for step in range(steps)]


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


def test_step_goes_down_at_each_milestone():
    found = rates("step", 100, **DOWN)
    assert found[:50] == [1.0] * 50
    assert found[50:75] == [pytest.approx(0.1)] * 25
    assert found[75:] == [pytest.approx(0.01)] * 25


@given(st.integers(2, 500), st.integers(1, 99))
def test_milestones_count_from_the_nearest_step(steps, percent):
    found = rates("step", steps, milestones=(percent / 100,), gamma=0.5)
    assert found.count(1.0) == round(percent / 100 * steps)


@pytest.mark.parametrize("schedule", ["cosine", "step", "constant"])
def test_warm_up_rises_in_equal_parts_to_the_peak(schedule):
    found = rates(schedule, 100, warm_up=0.1, **DOWN)
    assert found[:11] == pytest.approx([part / 11 for part in range(1, 12)])
    assert max(found) == found[10] == 1.0


def test_cosine_falls_over_what_the_warm_up_leaves():
    found = rates("cosine", 111, warm_up=10 / 111)
    assert found[10:] == rates("cosine", 101)


def test_milestones_do_not_move_with_the_warm_up():
    assert rates("step", 100, warm_up=0.2, **DOWN)[20:] == rates("step", 100, **DOWN)[20:]


def test_one_cycle_has_a_warm_up_of_its_own():
    assert rates("one_cycle", 100, warm_up=0.5) == rates("one_cycle", 100)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_short_trainings_with_a_long_warm_up_reach_the_peak(schedule):
    assert rates(schedule, 3, warm_up=0.99)[-1] == (1e-4 if schedule == "one_cycle" else 1.0)


@pytest.mark.parametrize(("start", "end"), [(1.0, 8.0), (8.0, 1.0), (0.9, 0.0)])
def test_scheduled_numbers_go_from_start_to_end(start, end):
    positions = [step / 100 for step in range(101)]
    for shape in ("linear", "cosine"):
        found = [scheduled(start, end, shape, position) for position in positions]
        assert found[0] == pytest.approx(start, abs=1e-15)
        assert found[-1] == pytest.approx(end, abs=1e-15)
        assert found[50] == pytest.approx((start + end) / 2)
        assert found == sorted(found, reverse=start > end)


def test_linear_and_cosine_are_their_formulas():
    assert scheduled(2.0, 10.0, "linear", 0.25) == pytest.approx(4.0)
    assert scheduled(2.0, 10.0, "cosine", 0.25) == pytest.approx(6 - 4 * math.cos(math.pi / 4))


@given(st.floats(0, 1000), st.floats(0, 1000), st.sampled_from(["linear", "cosine"]), st.floats(0, 1))
def test_scheduled_numbers_stay_between_their_ends(start, end, shape, position):
    found = scheduled(start, end, shape, position)
    assert min(start, end) - 1e-9 <= found <= max(start, end) + 1e-9
