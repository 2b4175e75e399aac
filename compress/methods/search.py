"""How far along an axis one may go: bisection with few, costly trials. Pure functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

DIGITS = 3
"""Decimals of the values tried, so that people can read and repeat them."""


@dataclass(frozen=True)
class Axis:
    """Values of one setting between the one that does nothing and the strongest one allowed, in either direction."""

    nothing: float
    """Needs no trial: it passes."""
    target: float
    """Another number than `nothing`."""

    def strength(self, value: float) -> float:
        """How far towards the target a value lies: 0 where nothing is done, 1 at the target."""
        return (value - self.nothing) / (self.target - self.nothing)

    def strongest_first(self, values: Sequence[float]) -> list[float]:
        """The values in the order of their strength."""
        return sorted(values, key=self.strength, reverse=True)


class Trial(NamedTuple):
    """A value that was tried, and whether it may be used."""

    value: float
    passed: bool


def search(axis: Axis, passes: Callable[[float], bool], trials: int) -> tuple[Trial, ...]:
    """Try the target, and where it fails bisect between the strongest value that passed and the weakest that failed.

    Where everything weaker than a value that passes passes too, the strongest one that passed lies within
    |target - nothing| / 2^(trials - 1), and the rounding, of the strongest there is. Where that does not hold, the result
    depends on which values were tried; one that failed is never taken for one that passed.

    Args:
        axis: what is searched.
        passes: tries a value; never asked twice for the same one.
        trials: values tried at most, 1 or more.

    Returns:
        Every trial, in order; fewer than allowed where the target passes, or no value of `DIGITS` decimals is left.
    """
    tried: list[Trial] = []
    while len(tried) < trials and (value := next_value(axis, tried)) is not None:
        tried.append(Trial(value, passes(value)))
    return tuple(tried)


def next_value(axis: Axis, tried: Sequence[Trial]) -> float | None:
    """What to try next, None where nothing is left: see `search`."""
    if axis.target not in [trial.value for trial in tried]:
        return axis.target
    passed = [axis.nothing, *(trial.value for trial in tried if trial.passed)]
    weak = max(passed, key=axis.strength)
    stronger = [trial.value for trial in tried if not trial.passed and axis.strength(trial.value) > axis.strength(weak)]
    if not stronger:
        return None
    strong = min(stronger, key=axis.strength)
    middle = round((weak + strong) / 2, DIGITS)
    is_between = axis.strength(weak) < axis.strength(middle) < axis.strength(strong)
    return middle if is_between else None
