"""`prune`: remove whole channels, the lowest scores first, then recover the accuracy by training."""

from __future__ import annotations

import copy
import fnmatch
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from compress import surgery
from compress.checkpoint import Checkpoint, Draft
from compress.config import PruneConfig
from compress.data.base import Inputs
from compress.edits import Attribute, Edit
from compress.errors import StageError, first_line
from compress.methods import attention
from compress.methods.groups import ChannelGraph, ChannelGroup, copy_on_cpu, l1_scores
from compress.methods.importance import lowest
from compress.methods.silence import (
    CANNOT_TELL,
    OUTPUTS_CHANGE,
    in_double,
    randomise,
    silence,
    unseen,
    what_differs,
)
from compress.methods.trial import find_broken
from compress.models.cost import output_positions
from compress.stages.base import (
    Context,
    Cost,
    check_forward,
    cost_of,
    described,
    recover,
    warn_of_idle_patterns,
    what_remains,
)

_SEARCH_STEPS = 24
_TRIED_RATIO = 0.5
"""Fraction of its channels that a group loses in its trial: much, so that a wrong wire shows."""
_TRIED_SAMPLES = 4
_MOST_SIZES = 16
"""Ways tried to set the sizes that a model remembers."""
_OUTPUTS = "they are outputs of the model"
Removed = Mapping[str, Sequence[int]]


def run(parent: Checkpoint, config: PruneConfig, context: Context) -> Draft:
    """Prune to the target and recover.

    Raises:
        StageError: where the target cannot be reached, naming what can.
    """
    model = parent.build(context.trusted)
    example = context.example()
    warn_of_idle_patterns("prune.protect", config.protect, [name for name, _ in model.named_modules()], context)
    pruner = _Pruner(model, example, config, context)
    removed, edits = pruner.choose()
    if not any(removed.values()):
        context.warn(f"nothing was pruned: {pruner.why_nothing()}")
    for edit in edits:
        if isinstance(edit, Attribute) and not _is_layer(model.get_submodule(edit.module)):
            context.note(f"the model's '{'.'.join(filter(None, (edit.module, edit.name)))}' becomes {edit.value}")
    before = cost_of(model, example)
    _cut(model, edits)
    check_forward(model, example, len(context.data.classes), "prune: the pruned model")
    pruned = f"{sum(map(bool, removed.values()))} of {len(removed) + len(pruner.left_alone)} groups pruned"
    context.note(f"{what_remains(before, cost_of(model, example))}; {pruned}")
    training = recover(model, config.recovery, context)
    return Draft(parent.arch, (*parent.edits, *edits), model, training=training)


def _cut(model: nn.Module, edits: Sequence[Edit]) -> nn.Module:
    """Apply edits in place, attention's scale kept."""
    widths = attention.head_widths(model)
    surgery.apply_all(model, edits)
    attention.keep_scale(model, widths)
    return model


def _is_layer(module: nn.Module) -> bool:
    """Whether a module is one of torch's own layers, or made of one, whose sizes torch-pruning keeps."""
    kinds = (base.__module__ for base in type(module).__mro__)
    return any(kind.startswith("torch.nn.modules.") and not kind.endswith((".module", ".container")) for kind in kinds)


class _BrokenError(Exception):
    """Channels that cannot be removed; its text says why."""


class _Pruner:
    """Finds the groups that can go, and how much of each has to."""

    def __init__(self, model: nn.Module, example: Inputs, config: PruneConfig, context: Context) -> None:
        self.model, self.example, self.config, self.context = copy_on_cpu(model), example, config, context
        samples = np.linspace(0, len(context.data.train) - 1, _TRIED_SAMPLES).round().astype(int).tolist()
        several = next(iter(context.data.train.take(samples).batches(_TRIED_SAMPLES))).inputs
        self.random, self.tried = in_double(randomise(copy_on_cpu(model)), several)
        self.before = cost_of(self.model, example)
        self.positions = output_positions(self.model, example)
        self.left_alone: dict[str, str] = {}
        candidates = self._candidates()
        self._by_name = {group.name: group for group in candidates}
        self.order = {group.name: l1_scores(self.model, group) for group in candidates}
        self.groups = self._prunable(candidates)

    def why_nothing(self) -> str:
        """Which filter excluded the groups."""
        if self.groups:
            return f"no group can lose a multiple of {self.config.multiple} channels at this target"
        reasons = described(self.left_alone) or "there is no convolution or linear layer"
        return f"no group of channels can be pruned: {reasons}"

    def choose(self) -> tuple[Removed, tuple[Edit, ...]]:
        """Channels to remove so that the target is met, and what that means for every tensor.

        Raises:
            StageError: where the target cannot be reached.
        """
        while True:
            removed = self.search()
            try:
                return removed, self._edits(removed)
            except _BrokenError:
                # Each group passed its trial, but not with as many channels as the target takes.
                self._leave_alone(self._broken_of(removed))
                self.groups = [group for group in self.groups if group.name not in self.left_alone]

    def _broken_of(self, removed: Removed) -> list[tuple[ChannelGroup, str]]:
        def why_not(groups: Sequence[ChannelGroup]) -> str | None:
            return self._why_not({group.name: removed[group.name] for group in groups})

        return find_broken([group for group in self.groups if removed[group.name]], why_not)

    def search(self) -> Removed:
        """Channels to remove from each group so that the target is met."""
        target = self.config.target
        if target.kind == "ratio":
            return self._removed(self.groups, target.settings)
        low, high = 0.0, 1.0 - self.config.floor
        if self._remains(high) > target.settings:
            least = self._remains(high)
            raise StageError(
                f"prune.target.{target.kind}: {target.settings} cannot be reached: {least:.3f} remains with every group "
                f"at its floor of {self.config.floor:.0%} of its channels, in multiples of {self.config.multiple}"
                + (f"; left alone: {described(self.left_alone)}" if self.left_alone else "")
            )
        # What remains falls with the ratio in steps; bisection ends at the smallest ratio that meets the target.
        for _ in range(_SEARCH_STEPS):
            middle = (low + high) / 2
            low, high = (middle, high) if self._remains(middle) > target.settings else (low, middle)
        return self._removed(self.groups, high)

    def _removed(self, groups: Sequence[ChannelGroup], ratio: float) -> dict[str, list[int]]:
        return {
            group.name: lowest(self.order[group.name], group.channels - self._kept(group, ratio), group.blocks)
            for group in groups
        }

    def _kept(self, group: ChannelGroup, ratio: float) -> int:
        """Channels that stay: the nearest multiple, not below the floor, not above what there is."""
        multiple = self._multiple(group)
        nearest = multiple * math.floor(group.channels * (1 - ratio) / multiple + 0.5)
        floor = multiple * math.ceil(group.channels * self.config.floor / multiple)
        return min(group.channels, max(nearest, floor, multiple))

    def _multiple(self, group: ChannelGroup) -> int:
        return math.lcm(self.config.multiple, group.blocks)

    def _remains(self, ratio: float) -> float:
        """Fraction of MACs or parameters that remains, counted from the shapes that the weights will have."""
        removed = {name: set(gone) for name, gone in self._removed(self.groups, ratio).items()}
        cut: dict[str, dict[int, set[int]]] = {}
        for group in self.groups:
            for item in group.coupled:
                gone = {s for s, root in zip(item.slices, item.roots, strict=True) if root in removed[group.name]}
                # Where channels are concatenated, several groups cut the same axis.
                cut.setdefault(item.tensor, {}).setdefault(item.axis, set()).update(gone)
        saved = Cost(0, 0)
        for name, axes in cut.items():
            tensor = self.model.get_parameter(name)
            left = math.prod(size - len(axes.get(axis, ())) for axis, size in enumerate(tensor.shape))
            parameters = tensor.numel() - left
            layer, _, leaf = name.rpartition(".")
            positions = self.positions.get(layer, 0) if leaf.endswith("weight") else 0
            saved = Cost(saved.parameters + parameters, saved.macs + parameters * positions)
        if self.config.target.kind == "parameters":
            return 1 - saved.parameters / self.before.parameters
        return 1 - saved.macs / max(1, self.before.macs)

    def _candidates(self) -> list[ChannelGroup]:
        """Groups that may be tried; the others are remembered with the reason."""
        try:
            found = list(ChannelGraph(copy_on_cpu(self.model), self.example).groups())
        except Exception as error:  # torch-pruning raises whatever it stumbles over
            reason = f"{type(error).__name__}: {first_line(error)}"
            raise StageError(f"prune: torch-pruning cannot trace the dependencies of this model: {reason}") from error
        candidates = []
        for group in found:
            if pattern := self._protecting(group):
                self.left_alone[group.name] = f"protected by '{pattern}'"
            elif layer := self._parametrized(group):
                reason = f"'{layer}' computes its weight (weight_norm?): remove the parametrization first"
                self._leave_alone([(group, reason)])
            elif group.channels <= self._multiple(group):
                self.left_alone[group.name] = f"has {group.channels} channels, not more than the multiple"
            else:
                candidates.append(group)
        return candidates

    def _parametrized(self, group: ChannelGroup) -> str | None:
        return next((name for name in group.layers if is_parametrized(self.model.get_submodule(name))), None)

    def _prunable(self, candidates: Sequence[ChannelGroup]) -> list[ChannelGroup]:
        """Groups that survive a trial; the others are remembered with the reason, and named aloud."""
        read = [group for group in candidates if group.is_read]
        for group in candidates:
            if not group.is_read:
                reason = self._why_not(self._removed([group], _TRIED_RATIO)) or ""
                if reason.startswith(OUTPUTS_CHANGE):  # no surprise
                    self.left_alone[group.name] = _OUTPUTS
                else:
                    self._leave_alone([(group, "what reads them is no layer that this tool knows to cut")])
        dark = set(unseen(self.random, read, self.tried))
        reason = f"{CANNOT_TELL} they make no difference to the outputs for {_TRIED_SAMPLES} training samples"
        self._leave_alone([(group, reason) for group in read if group.name in dark])
        seen = [group for group in read if group.name not in dark]
        self._leave_alone(find_broken(seen, lambda groups: self._why_not(self._removed(groups, _TRIED_RATIO))))
        return [group for group in seen if group.name not in self.left_alone]

    def _leave_alone(self, broken: Sequence[tuple[ChannelGroup, str]]) -> None:
        for group, reason in broken:
            self.left_alone[group.name] = reason
            others = f" with {len(group.layers) - 1} layers behind it" if len(group.layers) > 1 else ""
            self.context.warn(
                f"the channels of '{group.name}'{others} are left alone: pruning them breaks the model: {reason}"
            )

    def _why_not(self, removed: Removed) -> str | None:
        try:
            self._edits(removed)
        except _BrokenError as error:
            return str(error)
        return None

    def _protecting(self, group: ChannelGroup) -> str | None:
        return next(
            (p for p in self.config.protect if any(fnmatch.fnmatchcase(name, p) for name in group.producers)), None
        )

    def _edits(self, removed: Removed) -> tuple[Edit, ...]:
        """What torch-pruning makes of the removal, as edits, and proven on random weights.

        Raises:
            _BrokenError: where it fails, or the result computes something else than the model with the channels silenced.
        """
        removed = {name: gone for name, gone in removed.items() if gone}
        if not removed:
            return ()
        try:
            throwaway = copy_on_cpu(self.model)
            graph = ChannelGraph(throwaway, self.example)
            surgery.encode_positions(throwaway)
            edits = surgery.derive(self.model, graph.remove(removed))
        except Exception as error:  # torch-pruning may raise anything; each is the answer
            raise _BrokenError(first_line(error)) from error
        if pair := surgery.unties(self.model, edits):
            raise _BrokenError(f"'{pair[0]}' and '{pair[1]}' share one weight, of which only one would be cut")
        return self._proven(edits, removed)

    def _proven(self, edits: tuple[Edit, ...], removed: Removed) -> tuple[Edit, ...]:
        """The edits, with sizes corrected that the model keeps in attributes of its own, where it needs them."""
        silenced = silence(copy.deepcopy(self.random), [self._by_name[name] for name in removed], removed)
        reason = self._difference(edits, silenced)
        if reason is None:
            return edits
        for sizes in self._remembered_sizes(removed):
            if self._difference((*edits, *sizes), silenced) is None:
                needed = list(sizes)
                for size in sizes:  # many are needed by nobody, and only equal the width by chance
                    others = [other for other in needed if other is not size]
                    if self._difference((*edits, *others), silenced) is None:
                        needed = others
                return (*edits, *needed)
        raise _BrokenError(reason)

    def _difference(self, edits: Sequence[Edit], silenced: nn.Module) -> str | None:
        try:
            return what_differs(silenced, _cut(copy.deepcopy(self.random), edits), self.random, self.tried)
        except Exception as error:  # noqa: BLE001  # a user's forward may raise anything; each is the answer
            return first_line(error)

    def _remembered_sizes(self, removed: Removed) -> Iterator[tuple[Attribute, ...]]:
        """Ways to set attributes, of modules that are no plain layers, that equal the old width of a narrower group.

        Such as `VisionTransformer.hidden_dim`, which torch-pruning does not know of. Where groups of one width get
        different ones, each is tried.
        """
        widths: dict[int, set[int]] = {}
        for name, gone in removed.items():
            channels = self._by_name[name].channels
            widths.setdefault(channels, set()).add(channels - len(gone))
        found = [
            (path, key, value)
            for path, module in self.model.named_modules()
            if not _is_layer(module)
            for key, value in vars(module).items()
            if type(value) is int and not key.startswith("_") and value in widths
        ]
        if not found:
            return
        used = sorted({value for _, _, value in found})
        ways = itertools.product(*(sorted(widths[value]) for value in used))
        for way in itertools.islice(ways, _MOST_SIZES):
            chosen = dict(zip(used, way, strict=True))
            yield tuple(Attribute(module=path, name=key, value=chosen[value]) for path, key, value in found)
