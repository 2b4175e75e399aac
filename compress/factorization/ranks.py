"""Which form each layer takes, so that a target is met."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from compress.factorization.forms import Form
from compress.methods import lowrank
from compress.methods.rank_allocation import Option, allocate

_SEARCH_STEPS = 40


class OutOfReachError(ValueError):
    """The cheapest forms take more than a budget."""

    def __init__(self, least: int) -> None:
        self.least = least
        """What they take, multiply-accumulates."""
        super().__init__(f"the least reachable is {least:,} multiply-accumulates")


@dataclass(frozen=True)
class Layer:
    """A layer that could be factorized."""

    name: str
    macs: int
    """Multiply-accumulates as it is, for one sample."""
    full_rank: int
    """Of its channel split."""
    forms: tuple[Form, ...]
    """Those that cost enough less, in any order."""


def at_energy(layers: Sequence[Layer], energy: float) -> dict[str, Form]:
    """The cheapest form of each layer that loses no more than `1 - energy` (0 to 1); layers without one stay whole."""
    chosen = {}
    for layer in layers:
        fitting = [form for form in layer.forms if form.error <= 1 - energy]
        if fitting:
            chosen[layer.name] = min(fitting, key=lambda form: (form.macs, form.error))
    return chosen


def at_ratio(layers: Sequence[Layer], ratio: float, multiple: int) -> dict[str, Form]:
    """Channel splits at this fraction (0 to 1) of the full ranks, rounded up to the multiple, where they pay."""
    chosen = {}
    for layer in layers:
        rank = lowrank.rounded_rank(math.ceil(layer.full_rank * ratio), multiple, layer.full_rank)
        form = next((form for form in layer.forms if form.split == "channel" and form.rank == rank), None)
        if form is not None:
            chosen[layer.name] = form
    return chosen


def same_energy(layers: Sequence[Layer], budget: int) -> dict[str, Form]:
    """Forms at the largest energy, the same for all layers, with which they stay within a budget.

    Args:
        layers: those that can be split.
        budget: the most MACs that all of them together may take.

    Raises:
        OutOfReachError: where the cheapest forms take more than the budget.
    """
    low, high = 0.0, 1.0
    least = macs(layers, at_energy(layers, low))
    if least > budget:
        raise OutOfReachError(least)
    # What remains grows with the energy in steps; bisection ends at the largest energy that meets the target.
    for _ in range(_SEARCH_STEPS):
        middle = (low + high) / 2
        fits = macs(layers, at_energy(layers, middle)) <= budget
        low, high = (middle, high) if fits else (low, middle)
    return at_energy(layers, low)


def least_error(layers: Sequence[Layer], budget: int) -> dict[str, Form]:
    """Forms with which the layers stay within a budget at the least sum of their relative errors.

    Args and errors as `same_energy`.
    """
    options = {
        layer.name: [Option(layer.macs, 0.0), *(Option(form.macs, form.error) for form in layer.forms)]
        for layer in layers
    }
    least = sum(min(option.macs for option in each) for each in options.values())
    if least > budget:
        raise OutOfReachError(least)
    chosen = allocate(options, budget)
    return {layer.name: layer.forms[chosen[layer.name] - 1] for layer in layers if chosen[layer.name] > 0}


def macs(layers: Sequence[Layer], chosen: Mapping[str, Form]) -> int:
    """MACs of all these layers, those named in `chosen` in that form."""
    return sum(chosen[layer.name].macs if layer.name in chosen else layer.macs for layer in layers)
