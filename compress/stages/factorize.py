"""`factorize`: layers become two thinner ones by a truncated SVD, where that saves work."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from compress import surgery
from compress.checkpoint import Checkpoint, Draft
from compress.config import FactorizeConfig
from compress.data.base import Inputs
from compress.edits import Factor
from compress.errors import StageError
from compress.factorization.ranks import Layer, Limits, at_energy, at_ratio, least_error, macs, same_energy
from compress.factorization.responses import responses
from compress.methods import lowrank
from compress.methods.groups import copy_on_cpu
from compress.methods.trial import find_broken
from compress.methods.whitening import Moments, shift_by_outputs, split_by_outputs, values_of_outputs
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

_BATCH = 32


def run(parent: Checkpoint, config: FactorizeConfig, context: Context) -> Draft:
    """Choose ranks, split the layers, and recover where asked to.

    Raises:
        StageError: where the target cannot be reached, naming what can.
    """
    model = parent.build(context.trusted)
    example = context.example()
    warn_of_idle_patterns("factorize.protect", config.protect, [name for name, _ in model.named_modules()], context)
    before = cost_of(model, example)
    positions, left_alone = _factorable(model, parent, example, config, context)
    heard = (
        responses(model, list(positions), context.samples(config.samples, context.seed).batches(_BATCH))
        if config.truncation == "outputs"
        else {}
    )
    layers = [_layer(model, name, positions[name], heard.get(name)) for name in positions]
    ranks = _chosen(layers, left_alone, config, before.macs)
    # A layer that has no bias gets one where that makes up for what the mean of its outputs would lose.
    edits = tuple(
        Factor(module=name, rank=rank, bias=name in heard and model.get_submodule(name).bias is None)
        for name, rank in ranks.items()
    )
    if not edits:
        reasons = {layer.name: "saves less than factorize.min_saving at its rank" for layer in layers} | left_alone
        context.warn(f"nothing was factorized: {described(reasons) or 'there is no linear or convolutional layer'}")
    for edit in edits:
        _split(model, edit, heard.get(edit.module))
    check_forward(model, example, len(context.data.classes), "factorize: the factorized model")
    split = f"{len(edits)} of {len(layers) + len(left_alone)} layers factorized"
    context.note(f"{what_remains(before, cost_of(model, example))}; {split}")
    training = recover(model, config.recovery, config.batchnorm_samples if edits else 0, context)
    return Draft(parent.arch, (*parent.edits, *edits), model, training=training)


def _layer(model: nn.Module, name: str, positions: int, heard: Moments | None) -> Layer:
    weight = model.get_submodule(name).get_parameter("weight").detach()
    if heard is None:
        return Layer(name, weight, positions, lowrank.singular_values(weight))
    return Layer(name, weight, positions, values_of_outputs(weight, heard.covariance))


def _split(model: nn.Module, edit: Factor, heard: Moments | None) -> None:
    """Replace a layer and fill its two factors."""
    layer = model.get_submodule(edit.module)
    weight, bias = layer.get_parameter("weight").detach(), getattr(layer, "bias", None)
    shift = torch.zeros(weight.shape[0], dtype=torch.float64) if bias is None else bias.detach().double()
    if heard is None:
        first, second = lowrank.split(weight, edit.rank)
    else:
        first, second = split_by_outputs(weight, heard.covariance, edit.rank)
        shift = shift + shift_by_outputs(second, heard.mean - shift)
    surgery.apply(model, edit)
    with torch.no_grad():
        model.get_submodule(f"{edit.module}.0").get_parameter("weight").copy_(first)
        target = model.get_submodule(f"{edit.module}.1")
        target.get_parameter("weight").copy_(second.reshape(target.get_parameter("weight").shape))
        if bias is not None or edit.bias:
            target.get_parameter("bias").copy_(shift)


def _factorable(
    model: nn.Module, parent: Checkpoint, example: Inputs, config: FactorizeConfig, context: Context
) -> tuple[dict[str, int], dict[str, str]]:
    """The layers that can be split, with their output positions, and the reason why not for each of the others."""
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
    return {name: positions[name] for name in names if name not in left_alone}, left_alone


def _chosen(
    layers: Sequence[Layer], left_alone: Mapping[str, str], config: FactorizeConfig, total_macs: int
) -> dict[str, int]:
    """Rank of each layer that gets cheaper by it."""
    target, limits = config.target, Limits(config.multiple, config.min_saving)
    if target.kind == "energy":
        return at_energy(layers, target.settings, limits)
    if target.kind == "ratio":
        return at_ratio(layers, target.settings, limits)
    others = total_macs - macs(layers, {})
    budget = int(target.settings * total_macs) - others
    try:
        return _ALLOCATIONS[config.allocation](layers, budget, limits)
    except ValueError as error:
        (least,) = error.args
        raise StageError(
            f"factorize.target.macs: {target.settings} cannot be reached: {(least + others) / total_macs:.3f} remains with every "
            f"layer at rank {config.multiple}, of {len(layers)} layers that can be split"
            + (f"; left alone: {described(left_alone)}" if left_alone else "")
        ) from None


_ALLOCATIONS = {"same_energy": same_energy, "least_error": least_error}
