"""At which rank each layer is split, so that a target is met."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from compress.methods import lowrank
from compress.methods.rank_allocation import Option, allocate

_SEARCH_STEPS = 40


@dataclass(frozen=True)
class Layer:
    """A layer that could be factorized."""

    name: str
    weight: Tensor
    positions: int
    """Output positions."""
    values: Tensor
    """Singular values, descending: of the weight, or of its outputs."""

    def cost(self, rank: int) -> tuple[int, int]:
        """MACs of the layer as it is and as two factors."""
        return lowrank.factor_cost(self.weight.shape[0], self.weight[0].numel(), self.positions, rank)


@dataclass(frozen=True)
class Limits:
    """Which ranks there are."""

    multiple: int
    """Ranks are multiples of this."""
    min_saving: float
    """A layer is split only where that saves this fraction of its work, 0 to 1."""

    def cheaper(self, layers: Sequence[Layer], ranks: Mapping[str, int]) -> dict[str, int]:
        """Ranks rounded up to the multiple, of the layers that cost enough less when split."""
        chosen = {}
        for layer in layers:
            rank = lowrank.rounded_rank(ranks[layer.name], self.multiple, len(layer.values))
            if self.pays(layer, rank):
                chosen[layer.name] = rank
        return chosen

    def pays(self, layer: Layer, rank: int) -> bool:
        """Whether a layer costs enough less at this rank."""
        whole, split = layer.cost(rank)
        return split <= whole * (1 - self.min_saving)


def at_energy(layers: Sequence[Layer], energy: float, limits: Limits) -> dict[str, int]:
    """Ranks at which each layer keeps this fraction (0 to 1) of its squared singular values."""
    return limits.cheaper(layers, {x.name: lowrank.rank_for_energy(x.values, energy) for x in layers})


def at_ratio(layers: Sequence[Layer], ratio: float, limits: Limits) -> dict[str, int]:
    """Ranks that are this fraction (0 to 1) of the full ones."""
    return limits.cheaper(layers, {x.name: math.ceil(len(x.values) * ratio) for x in layers})


def same_energy(layers: Sequence[Layer], budget: int, limits: Limits) -> dict[str, int]:
    """Ranks at the largest energy, the same for all layers, with which they stay within a budget.

    Args:
        layers: those that can be split.
        budget: the most MACs that all of them together may take.
        limits: which ranks there are.

    Raises:
        ValueError: where the cheapest ranks take more than the budget; its argument is what they take.
    """
    low, high = 0.0, 1.0
    least = macs(layers, at_energy(layers, low, limits))
    if least > budget:
        raise ValueError(least)
    # What remains grows with the energy in steps; bisection ends at the largest energy that meets the target.
    for _ in range(_SEARCH_STEPS):
        middle = (low + high) / 2
        fits = macs(layers, at_energy(layers, middle, limits)) <= budget
        low, high = (middle, high) if fits else (low, middle)
    return at_energy(layers, low, limits)


def least_error(layers: Sequence[Layer], budget: int, limits: Limits) -> dict[str, int]:
    """Ranks with which the layers stay within a budget at the least sum of their relative errors.

    Args and errors as `same_energy`.
    """
    options, ranks = {}, {}
    for layer in layers:
        errors = lowrank.errors_by_rank(layer.values).tolist()
        whole, _ = layer.cost(1)
        possible = sorted(
            {lowrank.rounded_rank(rank, limits.multiple, len(errors)) for rank in range(1, len(errors) + 1)}
        )
        ranks[layer.name] = [None, *(rank for rank in possible if limits.pays(layer, rank))]
        options[layer.name] = [
            Option(whole, 0.0) if rank is None else Option(layer.cost(rank)[1], errors[rank - 1])
            for rank in ranks[layer.name]
        ]
    least = sum(min(option.macs for option in each) for each in options.values())
    if least > budget:
        raise ValueError(least)
    chosen = {name: ranks[name][index] for name, index in allocate(options, budget).items()}
    return {name: rank for name, rank in chosen.items() if rank is not None}


def macs(layers: Sequence[Layer], ranks: Mapping[str, int]) -> int:
    """MACs of all these layers, those named in `ranks` as two factors."""
    return sum(layer.cost(ranks[layer.name])[1] if layer.name in ranks else layer.cost(1)[0] for layer in layers)
