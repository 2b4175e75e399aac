"""`factorize`: layers become thinner ones in a row, where that saves work and time."""

from __future__ import annotations

import fnmatch
import functools
from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from compress import surgery
from compress.bench.trial_latency import layer_times
from compress.checkpoint import Checkpoint, Draft
from compress.config import FactorizeConfig
from compress.data.base import Inputs
from compress.edits import Factor, Split
from compress.errors import CompressError, StageError
from compress.factorization.calls import Call, calls_of
from compress.factorization.clock import Clock
from compress.factorization.faster import Choose, Kept, only_faster
from compress.factorization.forms import Form, Limits, forms_of, full_rank, split_weights
from compress.factorization.ranks import Layer, OutOfReachError, at_energy, at_ratio, least_error, macs, same_energy
from compress.factorization.responses import Heard, listen
from compress.methods.groups import copy_on_cpu
from compress.methods.times import Timer
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
from compress.stages.kept_times import kept_times

_BATCH = 32
_TIMES = "times.json"


def run(parent: Checkpoint, config: FactorizeConfig, context: Context, *, timer: Timer | None = None) -> Draft:
    """Choose forms and ranks, split the layers, and recover where asked to.

    Args:
        parent: the model.
        config: settings.
        context: data, seed, and who else trains along.
        timer: how layers are timed; by default in ONNX Runtime.

    Raises:
        StageError: where the target cannot be reached, naming what can; where layers cannot be timed.
    """
    model = parent.build(context.trusted)
    example = context.example()
    warn_of_idle_patterns("factorize.protect", config.protect, [name for name, _ in model.named_modules()], context)
    before = cost_of(model, example)
    calls, left_alone = _factorable(model, parent, example, config, context)
    heard = _heard(model, list(calls), config, context)
    layers = [_layer(model, name, call, config, heard.get(name)) for name, call in calls.items()]
    # A layer that has no bias gets one where that makes up for what the mean of its outputs would lose.
    biased = frozenset(name for name in heard if model.get_submodule(name).bias is None)
    clock = Clock(model, calls, biased, kept_times(timer or _timer(config), context.scratch / _TIMES, context.group))
    try:
        kept = _kept(layers, clock, config, context, before.macs)
    except OutOfReachError as error:
        raise StageError(_out_of_reach(error.least, layers, left_alone, config, before.macs)) from None
    edits = tuple(
        Factor(module=name, rank=form.rank, bias=name in biased, split=form.split, rank_in=form.rank_in)
        for name, form in kept.forms.items()
    )
    if not edits:
        reasons = {layer.name: "saves less than factorize.min_saving at its rank" for layer in layers} | left_alone
        reasons |= {name: f"not faster: {times}" for name, times in kept.slower.items()}
        context.warn(f"nothing was factorized: {described(reasons) or 'there is no linear or convolutional layer'}")
    for edit in edits:
        _split(model, edit, kept.forms[edit.module], heard.get(edit.module))
    check_forward(model, example, len(context.data.classes), "factorize: the factorized model")
    context.note(f"{what_remains(before, cost_of(model, example))}; {_told(kept.forms, len(layers) + len(left_alone))}")
    training = recover(model, config.recovery, config.batchnorm_samples if edits else 0, context)
    return Draft(parent.arch, (*parent.edits, *edits), model, training=training)


def _told(forms: Mapping[str, Form], layers: int) -> str:
    text = f"{len(forms)} of {layers} layers factorized"
    counts = Counter(form.split for form in forms.values())
    return (
        text if set(counts) <= {"channel"} else f"{text} ({', '.join(f'{n} {split}' for split, n in counts.items())})"
    )


def _heard(model: nn.Module, names: Sequence[str], config: FactorizeConfig, context: Context) -> dict[str, Heard]:
    """What layers answer to training samples, where that is to be kept."""
    if config.truncation == "weights":
        return {}
    several = _splits(config) != ("channel",)
    convolutions = {name for name in names if model.get_submodule(name).get_parameter("weight").dim() == 4}
    wide = {name for name in convolutions if model.get_submodule(name).get_parameter("weight")[0, 0].numel() > 1}
    chosen = context.samples(config.samples, context.seed)
    return listen(model, names, chosen.batches(_BATCH), patches_of=wide if several else (), samples=len(chosen))


def _splits(config: FactorizeConfig) -> tuple[Split, ...]:
    """Forms that layers may take; a ratio is one of the channel split's rank."""
    return ("channel",) if config.target.kind == "ratio" else config.splits


def _layer(model: nn.Module, name: str, call: Call, config: FactorizeConfig, heard: Heard | None) -> Layer:
    weight = model.get_submodule(name).get_parameter("weight").detach()
    forms = forms_of(weight, call, _splits(config), Limits(config.multiple, config.min_saving), heard)
    return Layer(name, weight.numel() * call.out, full_rank(weight), forms)


def _split(model: nn.Module, edit: Factor, form: Form, heard: Heard | None) -> None:
    """Replace a layer and fill its parts."""
    layer = model.get_submodule(edit.module)
    weight, bias = layer.get_parameter("weight").detach(), getattr(layer, "bias", None)
    found = split_weights(weight, None if bias is None else bias.detach(), form, heard)
    surgery.apply(model, edit)
    with torch.no_grad():
        parts = [model.get_submodule(f"{edit.module}.{position}") for position in range(len(found.parts))]
        for part, values in zip(parts, found.parts, strict=True):
            target = part.get_parameter("weight")
            target.copy_(values.reshape(target.shape))
        if bias is not None or edit.bias:
            shift = torch.zeros(weight.shape[0], dtype=torch.float64) if found.shift is None else found.shift
            parts[-1].get_parameter("bias").copy_(shift if bias is None else shift + bias.detach().double())


def _timer(config: FactorizeConfig) -> Timer:
    def timer(layers: Mapping[str, tuple[nn.Module, tuple[int, ...]]]) -> Mapping[str, Sequence[float]]:
        try:
            return layer_times(layers, int8=config.timed_as == "int8")
        except CompressError as error:
            raise StageError(f"factorize.faster_by: layers cannot be timed: {error}; 0 measures nothing") from error

    return timer


def _kept(layers: Sequence[Layer], clock: Clock, config: FactorizeConfig, context: Context, total_macs: int) -> Kept:
    """Forms that meet the target and are faster here; what is not, and a target that is missed for that, is said."""
    choose: Choose = functools.partial(_chosen, config=config, total_macs=total_macs)
    if config.faster_by == 0:
        return Kept(choose(layers), {}, is_met=True)

    kept = only_faster(layers, choose, clock.times, config.faster_by)
    if kept.slower:
        context.note(
            f"{len(kept.slower)} of {len(kept.slower) + len(kept.forms)} splits were not faster on this machine "
            f"({config.timed_as}) and are left whole: {described({name: str(each) for name, each in kept.slower.items()})}"
        )
    if not kept.is_met:
        context.warn(_missed(layers, kept, config, total_macs))
    return kept


def _missed(layers: Sequence[Layer], kept: Kept, config: FactorizeConfig, total_macs: int) -> str:
    remains = (total_macs - macs(layers, {}) + macs(layers, kept.forms)) / total_macs
    return (
        f"factorize.target.macs: {config.target.settings} is not met, {remains:.3f} remains: the splits that it would take "
        f"are not {100 * config.faster_by:g} % faster on this machine; factorize.faster_by: 0 makes them all the same"
    )


def _factorable(
    model: nn.Module, parent: Checkpoint, example: Inputs, config: FactorizeConfig, context: Context
) -> tuple[dict[str, Call], dict[str, str]]:
    """The layers that can be split, with where they are applied, and the reason why not for each of the others."""
    found = output_positions(model, example)
    left_alone: dict[str, str] = {}
    for name in found:
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
    names = [name for name in found if name not in left_alone]

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
    return calls_of(model, [name for name in names if name not in left_alone], example), left_alone


def _chosen(layers: Sequence[Layer], config: FactorizeConfig, total_macs: int) -> dict[str, Form]:
    """Form of each layer that gets cheaper by it."""
    target = config.target
    if target.kind == "energy":
        return at_energy(layers, target.settings)
    if target.kind == "ratio":
        return at_ratio(layers, target.settings, config.multiple)
    others = total_macs - macs(layers, {})
    budget = int(target.settings * total_macs) - others
    return _ALLOCATIONS[config.allocation](layers, budget)


def _out_of_reach(
    least: int, layers: Sequence[Layer], left_alone: Mapping[str, str], config: FactorizeConfig, total_macs: int
) -> str:
    others = total_macs - macs(layers, {})
    return (
        f"factorize.target.macs: {config.target.settings} cannot be reached: {(least + others) / total_macs:.3f} remains with "
        f"every layer in its cheapest form (ranks of {config.multiple}), of {len(layers)} layers that can be split"
        + (f"; left alone: {described(left_alone)}" if left_alone else "")
    )


_ALLOCATIONS = {"same_energy": same_energy, "least_error": least_error}
