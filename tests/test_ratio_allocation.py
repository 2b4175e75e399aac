"""Ratios of groups under a saving, against all combinations tried one by one."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compress.methods.ratio_allocation import Step, allocate_ratios

RATIOS = (0.25, 0.5, 0.75)
LOSSES = st.lists(st.floats(-0.1, 1), min_size=3, max_size=3)
SAVINGS = st.lists(st.integers(1, 40), min_size=3, max_size=3).map(itertools.accumulate).map(tuple)
GROUP = st.builds(
    lambda saved, losses: [Step(*each) for each in zip(RATIOS, saved, losses, strict=True)], SAVINGS, LOSSES
)
GROUPS = st.lists(GROUP, min_size=1, max_size=4).map(lambda some: {f"group{n}": steps for n, steps in enumerate(some)})


def step_of(steps, ratio):
    return next((step for step in steps if step.ratio == ratio), Step(0.0, 0, 0.0))


def saved(groups, chosen):
    return sum(step_of(steps, chosen[name]).saved for name, steps in groups.items())


def loss(groups, chosen):
    return math.fsum(max(0.0, step_of(steps, chosen[name]).loss) for name, steps in groups.items())


def best_loss(groups, saving):
    """By trying everything."""
    ways = (dict(zip(groups, way, strict=True)) for way in itertools.product((0.0, *RATIOS), repeat=len(groups)))
    return min(loss(groups, way) for way in ways if saved(groups, way) >= saving)


def reachable(groups):
    return sum(steps[-1].saved for steps in groups.values())


@given(GROUPS, st.floats(0, 1))
def test_enough_is_saved_at_nearly_the_least_loss(groups, share):
    saving = round(share * reachable(groups))
    chosen = allocate_ratios(groups, saving)
    assert set(chosen) == set(groups)
    assert set(chosen.values()) <= {0.0, *RATIOS}
    assert saved(groups, chosen) >= saving
    best, largest = best_loss(groups, saving), max(step.loss for steps in groups.values() for step in steps)
    assert best - 1e-9 <= loss(groups, chosen) <= best + max(largest, 0.0) + 1e-9


@given(GROUPS, st.floats(0, 1), st.floats(0, 1))
def test_saving_less_never_loses_more(groups, one, other):
    less, more = sorted(round(share * reachable(groups)) for share in (one, other))
    assert loss(groups, allocate_ratios(groups, less)) <= loss(groups, allocate_ratios(groups, more)) + 1e-9


@given(GROUPS)
def test_the_most_can_be_saved_and_no_more(groups):
    assert allocate_ratios(groups, reachable(groups)) == dict.fromkeys(groups, 0.75)
    with pytest.raises(ValueError, match=f"cannot be saved: the most is {reachable(groups):,}"):
        allocate_ratios(groups, reachable(groups) + 1)


def test_by_hand():
    groups = {
        "robust": [Step(0.25, 10, 0.0), Step(0.5, 20, 0.01), Step(0.75, 30, 0.5)],
        "tender": [Step(0.25, 10, 0.2), Step(0.5, 20, 0.4), Step(0.75, 30, 0.8)],
        "fixed": [],
    }
    assert allocate_ratios(groups, 20) == {"robust": 0.5, "tender": 0.0, "fixed": 0.0}
    assert allocate_ratios(groups, 30) == {"robust": 0.5, "tender": 0.25, "fixed": 0.0}
    assert allocate_ratios({"fixed": []}, 0) == {"fixed": 0.0}


def test_a_step_cannot_add_work():
    with pytest.raises(ValueError, match="'odd' has a step that saves -1 "):
        allocate_ratios({"odd": [Step(0.5, -1, 0.0)]}, 0)
