"""`factorize`: layers become two thinner ones by a truncated SVD, where that saves work."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from compress import surgery
from compress.checkpoint import Checkpoint, Draft
from compress.config import FactorizeConfig
from compress.data.base import Inputs
from compress.edits import Factor
from compress.errors import StageError
from compress.methods import lowrank
from compress.methods.groups import copy_on_cpu
from compress.methods.trial import find_broken
from compress.models.cost import output_positions
from compress.stages.base import (
    Context,
    check_forward,
    cost_of,
    described,
    recover,
    warn_of_idle_patterns,
    what_remains,
)

_SEARCH_STEPS = 40


@dataclass(frozen=True)
class _Layer:
    """A layer that could be factorized."""

    name: str
    weight: Tensor
    positions: int
    values: Tensor
    """Singular values, descending."""

    def cost(self, rank: int) -> tuple[int, int]:
        """MACs of the layer as it is and as two factors."""
        return lowrank.factor_cost(self.weight.shape[0], self.weight[0].numel(), self.positions, rank)


def run(parent: Checkpoint, config: FactorizeConfig, context: Context) -> Draft:
    """Choose ranks, split the layers, and recover where asked to.

    Raises:
        StageError: where the target cannot be reached, naming what can.
    """
    model = parent.build(context.trusted)
    example = context.example()
    warn_of_idle_patterns("factorize.protect", config.protect, [name for name, _ in model.named_modules()], context)
    before = cost_of(model, example)
    layers, left_alone = _factorable(model, parent, example, config, context)
    ranks = _choose_ranks(layers, left_alone, config, before.macs)
    edits = tuple(Factor(module=name, rank=rank) for name, rank in ranks.items())
    if not edits:
        reasons = {layer.name: "saves less than factorize.min_saving at its rank" for layer in layers} | left_alone
        context.warn(f"nothing was factorized: {described(reasons) or 'there is no linear or convolutional layer'}")
    for edit in edits:
        _split(model, edit)
    check_forward(model, example, len(context.data.classes), "factorize: the factorized model")
    split = f"{len(edits)} of {len(layers) + len(left_alone)} layers factorized"
    context.note(f"{what_remains(before, cost_of(model, example))}; {split}")
    training = recover(model, config.recovery, context)
    return Draft(parent.arch, (*parent.edits, *edits), model, training=training)


def _split(model: nn.Module, edit: Factor) -> None:
    """Replace a layer and fill its two factors."""
    layer = model.get_submodule(edit.module)
    weight, bias = layer.get_parameter("weight").detach(), getattr(layer, "bias", None)
    first, second = lowrank.split(weight, edit.rank)
    surgery.apply(model, edit)
    with torch.no_grad():
        model.get_submodule(f"{edit.module}.0").get_parameter("weight").copy_(first)
        target = model.get_submodule(f"{edit.module}.1")
        target.get_parameter("weight").copy_(second.reshape(target.get_parameter("weight").shape))
        if bias is not None:
            target.get_parameter("bias").copy_(bias.detach())


def _factorable(
    model: nn.Module, parent: Checkpoint, example: Inputs, config: FactorizeConfig, context: Context
) -> tuple[list[_Layer], dict[str, str]]:
    """The layers that can be split, and the reason why not for each of the others."""
    positions = output_positions(model, example)
    left_alone: dict[str, str] = {}
    for name in positions:
        if pattern := next((p for p in config.protect if fnmatch.fnmatchcase(name, p)), None):
            left_alone[name] = f"protected by '{pattern}'"
        elif surgery.is_factor_of(name, parent.edits):
            left_alone[name] = "a factor already"
        elif is_parametrized(model.get_submodule(name)):
            left_alone[name] = "it computes its weight (weight_norm?): remove the parametrization first"
        elif surgery.factor_pair(model.get_submodule(name), 1) is None:
            left_alone[name] = "a layer of this kind has no such form"
        elif other := surgery.tied_to(model, f"{name}.weight"):
            left_alone[name] = f"it shares its weight with '{other}'"
    names = [name for name in positions if name not in left_alone]

    def why_not(tried: Sequence[str]) -> str | None:
        copied = copy_on_cpu(model)
        for name in tried:
            surgery.apply(copied, Factor(module=name, rank=1))
        try:
            check_forward(copied, example, len(context.data.classes), "")
        except StageError as error:
            return str(error).removeprefix(": ")
        return None

    for name, reason in find_broken(names, why_not):
        left_alone[name] = reason
        context.warn(f"'{name}' is left whole: splitting it breaks the model: {reason}")
    layers = []
    for name in names:
        if name not in left_alone:
            weight = model.get_submodule(name).get_parameter("weight").detach()
            layers.append(_Layer(name, weight, positions[name], lowrank.singular_values(weight)))
    return layers, left_alone


def _choose_ranks(
    layers: Sequence[_Layer], left_alone: Mapping[str, str], config: FactorizeConfig, total_macs: int
) -> dict[str, int]:
    """Rank of each layer that gets cheaper by it."""
    target = config.target
    if target.kind == "energy":
        return _at_energy(layers, target.settings, config)
    if target.kind == "ratio":
        return _cheaper(layers, {x.name: math.ceil(len(x.values) * target.settings) for x in layers}, config)
    low, high = 0.0, 1.0
    least = _remains(layers, _at_energy(layers, low, config), total_macs)
    if least > target.settings:
        raise StageError(
            f"factorize.target.macs: {target.settings} cannot be reached: {least:.3f} remains with every layer at rank "
            f"{config.multiple}, of {len(layers)} layers that can be split"
            + (f"; left alone: {described(left_alone)}" if left_alone else "")
        )
    # What remains grows with the energy in steps; bisection ends at the largest energy that meets the target.
    for _ in range(_SEARCH_STEPS):
        middle = (low + high) / 2
        fits = _remains(layers, _at_energy(layers, middle, config), total_macs) <= target.settings
        low, high = (middle, high) if fits else (low, middle)
    return _at_energy(layers, low, config)


def _at_energy(layers: Sequence[_Layer], energy: float, config: FactorizeConfig) -> dict[str, int]:
    return _cheaper(layers, {x.name: lowrank.rank_for_energy(x.values, energy) for x in layers}, config)


def _cheaper(layers: Sequence[_Layer], ranks: Mapping[str, int], config: FactorizeConfig) -> dict[str, int]:
    """Ranks rounded to the multiple, of the layers that cost less when split."""
    chosen = {}
    for layer in layers:
        rank = lowrank.rounded_rank(ranks[layer.name], config.multiple, len(layer.values))
        whole, split = layer.cost(rank)
        if split <= whole * (1 - config.min_saving):
            chosen[layer.name] = rank
    return chosen


def _remains(layers: Sequence[_Layer], ranks: Mapping[str, int], total_macs: int) -> float:
    saved = 0
    for layer in layers:
        if layer.name in ranks:
            whole, split = layer.cost(ranks[layer.name])
            saved += whole - split
    return 1 - saved / max(1, total_macs)
