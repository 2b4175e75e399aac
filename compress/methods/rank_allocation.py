"""Which option each layer takes, so that little error is made with few multiply-accumulates. Pure functions, no torch.

Each layer has options, of which it takes one: whole at error 0, or factors of some rank at some error. Choosing them
under a budget is the multiple-choice knapsack problem. Its relaxation is solved by going down the lower convex hulls of
all layers at once, the step first that saves most for its error (Sinha & Zoltners 1979, "The Multiple-Choice Knapsack
Problem", Operations Research 27(3); Shoham & Gersho 1988, "Efficient Bit Allocation for an Arbitrary Set of
Quantizers", IEEE Transactions on Acoustics, Speech and Signal Processing 36(9)).
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import NamedTuple


@dataclass(frozen=True)
class Option:
    """One way to compute a layer."""

    macs: int
    """Multiply-accumulates."""
    error: float
    """What it costs in quality: 0 or more, finite, in a unit in which the errors of layers may be added up."""


class _Corner(NamedTuple):
    """A corner of a layer's lower convex hull."""

    macs: int
    error: float
    option: int


class _Step(NamedTuple):
    """From one corner to the next cheaper one."""

    rate: float
    """Error added per multiply-accumulate saved."""
    layer: str
    to: int
    saved: int
    added: float


class _Result(NamedTuple):
    """One layer settled, the others after a number of steps; the order of the fields is the order of preference."""

    error: float
    macs: int
    layer: str
    option: int
    steps: int


def allocate(options: Mapping[str, Sequence[Option]], budget: int) -> dict[str, int]:
    """Choose an option for each layer so that all together stay within the budget, at little total error.

    All layers begin at their least error; the steps down the hulls are taken in the order of their error per
    multiply-accumulate saved until the budget is met. The last step may save more than is needed. To spend the rest,
    every option of every layer, on its hull or not, is tried as settled, the other layers taking their steps under what
    it leaves, and the best of all these results is kept.

    The total error is at most the least possible one plus the error of a single step between neighbouring corners of a
    layer's hull, and usually far closer. It never grows with the budget, because none of the results compared does;
    filling up what then remains layer by layer would lose that. The order of the layers does not matter.

    Args:
        options: by the name of the layer, in any order, the layer as it is among them.
        budget: the most multiply-accumulates that all layers together may take.

    Returns:
        For each layer the index of its option.

    Raises:
        ValueError: where the budget is below what the cheapest options take, naming that; where a layer has no option,
            or one whose error is not a finite number of 0 or more.
    """
    for name, choices in options.items():
        if not choices:
            raise ValueError(f"'{name}' has no options")
        if wrong := [option.error for option in choices if not 0 <= option.error < math.inf]:
            raise ValueError(f"'{name}' has an option of error {wrong[0]}; errors must be finite and 0 or more")
    least = sum(min(option.macs for option in choices) for choices in options.values())
    if budget < least:
        raise ValueError(f"a budget of {budget:,} multiply-accumulates cannot be met: the least reachable is {least:,}")
    hulls = {name: _hull(choices) for name, choices in options.items()}
    steps = sorted((step for name, hull in hulls.items() for step in _steps(name, hull)), key=_order)
    chosen = {name: hull[0].option for name, hull in hulls.items()}
    best = min(_results(options, chosen, steps, budget), default=None)
    if best is not None:
        chosen |= {step.layer: step.to for step in _without(steps, best.layer)[: best.steps]}
        chosen[best.layer] = best.option
    return chosen


def _order(step: _Step) -> tuple[float, str]:
    return step.rate, step.layer  # sorting is stable: the steps of one layer stay in order


def _results(
    options: Mapping[str, Sequence[Option]], chosen: Mapping[str, int], steps: Sequence[_Step], budget: int
) -> Iterator[_Result]:
    """For each option of each layer, the fewest steps of the others with which it meets the budget, if any do."""
    for name, choices in options.items():
        others = [options[other][index] for other, index in chosen.items() if other != name]
        taken = _without(steps, name)
        errors = list(accumulate((step.added for step in taken), initial=math.fsum(option.error for option in others)))
        saved = list(accumulate((step.saved for step in taken), initial=-sum(option.macs for option in others)))
        for index, option in enumerate(choices):
            count = bisect_left(saved, option.macs - budget)
            if count < len(saved):
                yield _Result(errors[count] + option.error, option.macs - saved[count], name, index, count)


def _without(steps: Sequence[_Step], layer: str) -> list[_Step]:
    return [step for step in steps if step.layer != layer]


def _hull(choices: Sequence[Option]) -> list[_Corner]:
    """Corners of the lower convex hull: from the least error, and the cheapest option that has it, to the fewest MACs."""
    ordered = sorted(
        (_Corner(option.macs, option.error, index) for index, option in enumerate(choices)),
        key=lambda corner: (corner.error, corner.macs),
    )
    hull: list[_Corner] = []
    for corner in ordered:
        if hull and corner.macs >= hull[-1].macs:
            continue  # no better in any way
        while len(hull) > 1 and _rate(hull[-2], hull[-1]) > _rate(hull[-1], corner):
            hull.pop()
        hull.append(corner)
    return hull


def _rate(dearer: _Corner, cheaper: _Corner) -> float:
    """Error added per multiply-accumulate saved."""
    return (cheaper.error - dearer.error) / (dearer.macs - cheaper.macs)


def _steps(layer: str, hull: Sequence[_Corner]) -> Iterator[_Step]:
    for dearer, cheaper in pairwise(hull):
        saved, added = dearer.macs - cheaper.macs, cheaper.error - dearer.error
        yield _Step(_rate(dearer, cheaper), layer, cheaper.option, saved, added)
