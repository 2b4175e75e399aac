"""`prune`: remove whole channels, the lowest scores first, then recover the accuracy by training."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import numpy as np
from torch import nn

from compress.checkpoint import Checkpoint, Draft
from compress.config import PruneConfig
from compress.data.base import Batch, Inputs
from compress.edits import Attribute, Edit
from compress.errors import StageError, listed
from compress.methods.groups import ChannelGroup
from compress.methods.importance import lowest, random
from compress.models.cost import output_positions
from compress.pruning.scores import scores_of
from compress.pruning.selection import Kept, Limits, Selection, Size
from compress.pruning.surgeon import Removed, Surgeon, cut, is_layer
from compress.seeds import derive_seed
from compress.stages.base import (
    Context,
    check_forward,
    cost_of,
    described,
    recover,
    warn_of_idle_patterns,
    what_remains,
)

_TRIED_RATIO = 0.5
"""Fraction of its channels that a group loses in its trial: much, so that a wrong wire shows."""
_TRIED_SAMPLES = 4
_BATCH = 64
_SHOWN = 5
_NEAR = 0.01
"""How far below its target a model may be, as a fraction of it, before that is worth a word."""


def run(parent: Checkpoint, config: PruneConfig, context: Context) -> Draft:
    """Prune to the target and recover.

    Raises:
        StageError: where the target cannot be reached, naming what can.
    """
    model = parent.build(context.trusted)
    example = context.example()
    warn_of_idle_patterns("prune.protect", config.protect, [name for name, _ in model.named_modules()], context)
    before = cost_of(model, example)
    surgeon = Surgeon(model, example, _samples(context), config.protect, context.warn)
    removed, edits, notes = _chosen(surgeon, example, config, context)
    if not any(removed.values()):
        context.warn(f"nothing was pruned: {_why_nothing(surgeon, config)}")
    for edit in edits:
        if isinstance(edit, Attribute) and not is_layer(model.get_submodule(edit.module)):
            context.note(f"the model's '{'.'.join(filter(None, (edit.module, edit.name)))}' becomes {edit.value}")
    cut(model, edits)
    check_forward(model, example, len(context.data.classes), "prune: the pruned model")
    pruned = f"{sum(map(bool, removed.values()))} of {len(removed) + len(surgeon.left_alone)} groups pruned"
    context.note(f"{what_remains(before, cost_of(model, example))}; {pruned}")
    for note in notes:
        context.note(note)
    training = recover(model, config.recovery, config.batchnorm_samples if edits else 0, context)
    return Draft(parent.arch, (*parent.edits, *edits), model, training=training)


def _samples(context: Context) -> Inputs:
    """A few training samples, far from each other."""
    places = np.linspace(0, len(context.data.train) - 1, _TRIED_SAMPLES).round().astype(int).tolist()
    return next(iter(context.data.train.take(places).batches(_TRIED_SAMPLES))).inputs


def _chosen(
    surgeon: Surgeon, example: Inputs, config: PruneConfig, context: Context
) -> tuple[Removed, tuple[Edit, ...], list[str]]:
    """The channels to remove, what that means for every tensor, and what is to be said of how they were chosen.

    Raises:
        StageError: where the target cannot be reached.
    """
    model, limits = surgeon.model, Limits(config.multiple, config.floor)
    few = [group for group in surgeon.groups if group.channels <= limits.multiple_of(group)]
    surgeon.exclude({group.name: f"has {group.channels} channels, not more than the multiple" for group in few})

    def batches() -> Iterator[Batch]:
        return context.samples(config.samples, derive_seed(context.seed, "scores")).batches(_BATCH)

    surgeon.try_groups({group.name: _tried(group, limits) for group in surgeon.groups})
    scores = scores_of(model, surgeon.groups, config.criterion, config.reduction, batches, context.seed)
    dumb = [group.name for group in surgeon.groups if group.name not in scores]
    if dumb:
        reason = f"nothing of them can be scored by '{config.criterion}'"
        context.warn(f"the channels of {listed(map(repr, dumb), _SHOWN)} are left alone: {reason}")
        surgeon.exclude(dict.fromkeys(dumb, reason))
    kinds = {group.name: _kind(model, group) for group in surgeon.groups}

    def selection() -> Selection:
        return Selection(surgeon.groups, scores, limits, config.ranking, config.normalize, kinds)

    cost = cost_of(model, example)
    size = Size(model, output_positions(model, example), cost.parameters, cost.macs)
    while True:
        chooses = selection()
        kept = _kept(chooses, size, surgeon, config)
        removed = chooses.removed(kept)
        edits = surgeon.edits(removed)
        if edits is not None:
            return removed, edits, list(_told(chooses, kept, size, config))
        # Each group passed its trial, but not with as many channels as the target takes.


def _tried(group: ChannelGroup, limits: Limits) -> list[int]:
    """Channels to remove on trial, here and there: those at one end would tell less of a shuffle."""
    gone = group.channels - limits.kept(group, group.channels * (1 - _TRIED_RATIO))
    return lowest(random(group.channels, derive_seed(0, "trial", group.name)), gone, group.blocks)


def _kept(chooses: Selection, size: Size, surgeon: Surgeon, config: PruneConfig) -> Kept:
    target = config.target
    if target.kind == "ratio":
        return chooses.at(target.settings)

    def remains(kept: Kept) -> float:
        return size.remains(chooses.groups, chooses.removed(kept), _counted(config))

    kept = chooses.meeting(target.settings, remains)
    if kept is None:
        raise StageError(
            f"prune.target.{target.kind}: {target.settings} cannot be reached: {remains(chooses.at(1.0)):.3f} remains with every "
            f"group at its floor of {config.floor:.0%} of its channels, in multiples of {config.multiple}"
            + (f"; left alone: {described(surgeon.left_alone)}" if surgeon.left_alone else "")
        )
    return kept


def _told(chooses: Selection, kept: Kept, size: Size, config: PruneConfig) -> Iterator[str]:
    """How channels were chosen where that is not the usual way, and that the target is not met closely where it is not."""
    usual = type(config).model_fields
    if any(getattr(config, name) != usual[name].default for name in ("criterion", "reduction", "ranking")):
        how = f", scores of a group's tensors by their {config.reduction}" if config.criterion != "random" else ""
        yield f"channels chosen by '{config.criterion}'{how}, ranked {_RANKED[config.ranking]}"
    target = config.target
    if target.kind != "ratio":
        left = size.remains(chooses.groups, chooses.removed(kept), _counted(config))
        if any(chooses.removed(kept).values()) and left < target.settings * (1 - _NEAR):
            yield f"{left:.3f} remains, as near to target.{target.kind} {target.settings:g} as whole multiples come"


def _counted(config: PruneConfig) -> Literal["macs", "parameters"]:
    return "parameters" if config.target.kind == "parameters" else "macs"


_RANKED = {
    "local": "in each group alone",
    "global": "over all groups",
    "isomorphic": "over all groups of one kind",
}


def _why_nothing(surgeon: Surgeon, config: PruneConfig) -> str:
    """Which filter excluded the groups."""
    if surgeon.groups:
        return f"no group can lose a multiple of {config.multiple} channels at this target"
    reasons = described(surgeon.left_alone) or "there is no convolution or linear layer"
    return f"no group of channels can be pruned: {reasons}"


def _kind(model: nn.Module, group: ChannelGroup) -> tuple[tuple[str, str, int], ...]:
    """The kinds of layers and the axes of a group's tensors: what scores of two groups must share to be compared."""
    found = []
    for item in group.coupled:
        layer, _, leaf = item.tensor.rpartition(".")
        found.append((type(model.get_submodule(layer)).__name__, leaf, item.axis))
    return tuple(sorted(set(found)))
