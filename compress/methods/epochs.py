"""What validation says of the epochs so far: which is the best, whether any more will help, whether training went astray."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

_ASTRAY_EPOCHS = 3
_ASTRAY_TIMES = 10.0


class Validated(NamedTuple):
    """What validation said after an epoch."""

    percent: float
    """Right answers, 0 to 100."""
    loss: float
    """Mean cross-entropy with the labels, in nats."""


def best(epochs: Sequence[Validated]) -> int:
    """Position of the best epoch: most right answers, of equals the lowest loss, of equals again the first.

    Args:
        epochs: at least one, in order.
    """
    return max(range(len(epochs)), key=lambda position: (epochs[position].percent, -epochs[position].loss))


def stalled(epochs: Sequence[Validated], patience: int) -> bool:
    """Whether the last `patience` epochs or more brought none that is better than all before them."""
    return bool(epochs) and len(epochs) - 1 - best(epochs) >= patience


def diverged(epochs: Sequence[Validated], classes: int, most_frequent_percent: float) -> bool:
    """Whether training went astray: for three epochs it knew nothing, was ever so sure of it, and did not improve.

    In each of them the validation loss is over ten times ln(classes), what guessing evenly costs; no more answers are right
    than by always naming the most frequent class; and the third loss is no lower than the first. Only the labels of validation
    count: a training loss changes legitimately with weights and temperatures that change over the training. One bad epoch,
    such as at the peak of the learning rate, is not enough, nor is a start from a broken model that gets better.

    Args:
        epochs: those so far, in order.
        classes: number of classes.
        most_frequent_percent: share of the most frequent class in validation, 0 to 100.
    """
    last = epochs[-_ASTRAY_EPOCHS:]
    if len(last) < _ASTRAY_EPOCHS or last[-1].loss < last[0].loss:
        return False
    too_high = _ASTRAY_TIMES * math.log(max(classes, 2))
    return all(epoch.loss > too_high and epoch.percent <= most_frequent_percent for epoch in last)
