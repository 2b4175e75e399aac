"""Numbers that change over a training, as pure functions of the step: nothing to save, nothing to restore."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

_WARM_UP = 0.3
_START = 1 / 25
_END = 1e-4


def learning_rate(
    schedule: Literal["one_cycle", "cosine", "step", "constant"],
    step: int,
    steps: int,
    *,
    warm_up: float = 0.0,
    milestones: Sequence[float] = (),
    gamma: float = 1.0,
) -> float:
    """Factor (0 to 1) of the peak learning rate at `step` of `steps`, counted from 0.

    `one_cycle` rises along a cosine from 1/25 of the peak over the first 30 % of the steps and falls along a cosine to
    1/10,000 of it (after Smith & Topin 2018, "Super-Convergence", arXiv:1708.07120); `cosine` only falls (Loshchilov &
    Hutter 2017, arXiv:1608.03983, eq. 5, without restarts); `step` is multiplied by `gamma` at each milestone. Before
    all but `one_cycle` the rate can rise linearly to the peak, in equal parts from the first step on (Goyal et al. 2017,
    arXiv:1706.02677, section 2.2); `cosine` then falls over the steps that are left.

    Args:
        schedule: the shape.
        step: 0 to `steps` - 1.
        steps: all steps of the training; a single one takes the peak.
        warm_up: fraction of the steps before the peak, 0 to below 1; not read by `one_cycle`, which has its own.
        milestones: fractions of all steps, warm-up included, at which `step` goes down; each counts from the first
            step at or after it, to the nearest step.
        gamma: factor at a milestone, above 0 to 1.
    """
    if steps <= 1:
        return 1.0
    if schedule == "one_cycle":
        return _one_cycle(step / (steps - 1))
    rising = min(round(warm_up * steps), steps - 1)
    if step < rising:
        return (step + 1) / (rising + 1)
    if schedule == "cosine":
        return _between(1.0, _END, (step - rising) / max(steps - 1 - rising, 1))
    if schedule == "step":
        return gamma ** sum(step >= round(milestone * steps) for milestone in milestones)
    return 1.0


def scheduled(start: float, end: float, shape: Literal["linear", "cosine"], position: float) -> float:
    """A number on its way from `start` to `end`, such as a temperature or the teacher's share.

    Args:
        start: value at position 0.
        end: value at position 1.
        shape: goes straight, or along half a cosine, slowly at both ends.
        position: 0 (the first step) to 1 (the last one).
    """
    if shape == "linear":
        return start * (1 - position) + end * position
    return _between(start, end, position)


def _one_cycle(position: float) -> float:
    if position < _WARM_UP:
        return _between(_START, 1.0, position / _WARM_UP)
    return _between(1.0, _END, (position - _WARM_UP) / (1 - _WARM_UP))


def _between(start: float, end: float, position: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * position)) / 2
