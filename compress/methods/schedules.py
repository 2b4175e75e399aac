"""Learning rates as pure functions of the step: nothing to save, nothing to restore."""

from __future__ import annotations

import math
from typing import Literal

_WARM_UP = 0.3
_START = 1 / 25
_END = 1e-4


def learning_rate(schedule: Literal["one_cycle", "cosine", "constant"], step: int, steps: int) -> float:
    """Factor (0 to 1) of the peak learning rate at `step` of `steps`, counted from 0.

    `one_cycle` rises along a cosine from 1/25 of the peak over the first 30 % of the steps and falls along a cosine to
    1/10,000 of it (after Smith & Topin 2018, "Super-Convergence", arXiv:1708.07120); `cosine` only falls (Loshchilov &
    Hutter 2017, arXiv:1608.03983, eq. 5, without restarts).
    """
    if schedule == "constant" or steps <= 1:
        return 1.0
    position = step / (steps - 1)
    if schedule == "cosine":
        return _between(1.0, _END, position)
    if position < _WARM_UP:
        return _between(_START, 1.0, position / _WARM_UP)
    return _between(1.0, _END, (position - _WARM_UP) / (1 - _WARM_UP))


def _between(start: float, end: float, position: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * position)) / 2
