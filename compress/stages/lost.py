"""What a model loses against another on samples of validation: the numbers that a budget is held against."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import JsonValue

from compress.checkpoint import Checkpoint
from compress.data.base import Split
from compress.methods.statistics import largest_loss, paired_difference
from compress.stages.base import Context
from compress.training import answered_correctly

_DECIMALS = 9
"""Of points, so that what makes 7 of 100 samples a little more than 7 points decides nothing."""


@dataclass(frozen=True)
class Loss:
    """Accuracy lost on the same samples, points; below 0 where it was gained."""

    points: float
    low: float
    high: float
    """Of the 95 % interval."""
    bound: float | None
    """The most that is lost with the confidence that was asked for; None where none was."""
    samples: int

    @property
    def decisive(self) -> float:
        """What is compared with a budget, points."""
        return self.points if self.bound is None else self.bound

    def __str__(self) -> str:
        bound = "" if self.bound is None else f", at most {self.bound:.2f},"
        return f"{self.points:.2f} points lost [{self.low:.2f}, {self.high:.2f}]{bound} on {self.samples:,} samples"


class Comparison:
    """Compares models with one standard on one split, in the leader of the group alone; all get what it finds."""

    def __init__(self, split: Split, standard: Checkpoint, confidence: float | None, context: Context) -> None:
        """Nothing is computed yet.

        Args:
            split: the samples.
            standard: what others are compared with.
            confidence: of the one-sided bound, 0.5 or more and below 1; None for no bound.
            context: device, trusted code and group.
        """
        self._split, self._standard, self._confidence, self._context = split, standard, confidence, context

    def __len__(self) -> int:
        """Number of samples."""
        return len(self._split)

    def loss(self, checkpoint: Checkpoint) -> Loss:
        """What the model of a checkpoint loses."""
        group = self._context.group
        found: Mapping[str, JsonValue] = {}
        if group.leads:
            found = asdict(lost(self._answers_of_standard, self._answers(checkpoint), self._confidence))
        shared: dict[str, Any] = group.shared(found)
        return Loss(**shared)

    @property
    def least(self) -> float:
        """What decides where a model answers exactly as the standard does, points: above 0 where a bound is asked for."""
        alike = np.ones(len(self), dtype=np.bool_)
        return lost(alike, alike, self._confidence).decisive

    @functools.cached_property
    def _answers_of_standard(self) -> NDArray[np.bool_]:
        return self._answers(self._standard)

    def _answers(self, checkpoint: Checkpoint) -> NDArray[np.bool_]:
        model = checkpoint.build(self._context.trusted).to(self._context.device)
        return answered_correctly(model, self._split, self._context.device)


def lost(standard: NDArray[np.bool_], other: NDArray[np.bool_], confidence: float | None) -> Loss:
    """What `other` loses against `standard`: whether each answers each sample correctly, both of shape (n,)."""
    # Adding 0 makes 0 of -0, which would be shown with its sign.
    points, high, low = (round(0.0 - 100 * share, _DECIMALS) + 0.0 for share in paired_difference(standard, other))
    bound = None if confidence is None else round(100 * largest_loss(standard, other, confidence), _DECIMALS) + 0.0
    return Loss(points, low, high, bound, len(standard))


def in_points(number: float) -> str:
    """Such as '1 point' or '0.5 points'."""
    return f"{number:g} point{'' if number == 1 else 's'}"


def rounded_up(points: float) -> float:
    """To hundredths, never down."""
    return math.ceil(round(100 * points, 6)) / 100
