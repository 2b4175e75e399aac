"""`prune`: remove whole channels, the lowest scores first, then recover the accuracy by training."""

from __future__ import annotations

import copy
import fnmatch
import math
from collections.abc import Mapping, Sequence

from torch import nn

from compress import surgery
from compress.checkpoint import Checkpoint, Draft
from compress.config import PruneConfig
from compress.data.base import Inputs
from compress.edits import Attribute, Edit
from compress.errors import StageError
from compress.methods import attention
from compress.methods.groups import ChannelGraph, ChannelGroup, copy_on_cpu, l1_scores
from compress.methods.importance import lowest
from compress.methods.silence import randomise, silence, what_differs
from compress.methods.trial import find_broken
from compress.models.cost import output_positions
from compress.stages.base import (
    Context,
    Cost,
    check_forward,
    cost_of,
    described,
    first_line,
    recover,
    warn_of_idle_patterns,
    what_remains,
)

_SEARCH_STEPS = 24
_TRIED_RATIO = 0.5
"""Fraction of its channels that a group loses in its trial: much, so that a wrong wire shows."""
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
    removed = pruner.search()
    if not any(removed.values()):
        context.warn(f"nothing was pruned: {pruner.why_nothing()}")
    edits = pruner.edits(removed)
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


class _BrokenError(Exception):
    """Channels that cannot be removed; its text says why."""


class _Pruner:
    """Finds the groups that can go, and how much of each has to."""

    def __init__(self, model: nn.Module, example: Inputs, config: PruneConfig, context: Context) -> None:
        self.model, self.example, self.config, self.context = copy_on_cpu(model), example, config, context
        self.random = randomise(copy_on_cpu(model))
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

    def edits(self, removed: Removed) -> tuple[Edit, ...]:
        """What removing these channels means for every tensor.

        Raises:
            StageError: where they cannot go together, though each of their groups passed its trial.
        """
        try:
            return self._edits({name: gone for name, gone in removed.items() if gone})
        except _BrokenError as error:
            raise StageError(f"prune: the chosen channels cannot be removed together: {error}") from error

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
            elif not group.is_read:
                self.left_alone[group.name] = _OUTPUTS
            elif group.channels <= self._multiple(group):
                self.left_alone[group.name] = f"has {group.channels} channels, not more than the multiple"
            else:
                candidates.append(group)
        return candidates

    def _prunable(self, candidates: Sequence[ChannelGroup]) -> list[ChannelGroup]:
        """Groups that survive a trial; the others are remembered with the reason, and named aloud."""

        def why_not(groups: Sequence[ChannelGroup]) -> str | None:
            try:
                self._edits(self._removed(groups, _TRIED_RATIO))
            except _BrokenError as error:
                return str(error)
            return None

        for group, reason in find_broken(candidates, why_not):
            self.left_alone[group.name] = reason
            others = f" with {len(group.layers) - 1} layers behind it" if len(group.layers) > 1 else ""
            self.context.warn(
                f"the channels of '{group.name}'{others} are left alone: pruning them breaks the model: {reason}"
            )
        return [group for group in candidates if group.name not in self.left_alone]

    def _protecting(self, group: ChannelGroup) -> str | None:
        return next(
            (p for p in self.config.protect if any(fnmatch.fnmatchcase(name, p) for name in group.producers)), None
        )

    def _edits(self, removed: Removed) -> tuple[Edit, ...]:
        """What torch-pruning makes of the removal, as edits, and proven on random weights.

        Raises:
            _BrokenError: where it fails, or the result computes something else than the model with the channels silenced.
        """
        if not any(removed.values()):
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
        reasons: list[str] = []
        for sizes in ((), self._remembered_sizes(removed)):
            if reasons and not sizes:
                break
            try:
                cut = _cut(copy.deepcopy(self.random), (*edits, *sizes))
                reason = what_differs(silenced, cut, self.random, self.example)
            except Exception as error:  # noqa: BLE001  # a user's forward may raise anything; each is the answer
                reason = first_line(error)
            if reason is None:
                return (*edits, *sizes)
            reasons.append(reason)
        raise _BrokenError(reasons[0])

    def _remembered_sizes(self, removed: Removed) -> tuple[Attribute, ...]:
        """Attributes of modules that are no plain layers and equal the old width of a group that gets narrower.

        Such as `VisionTransformer.hidden_dim`, which torch-pruning does not know of. A width that becomes two
        different ones is left out.
        """
        widths: dict[int, set[int]] = {}
        for name, gone in removed.items():
            channels = self._by_name[name].channels
            widths.setdefault(channels, set()).add(channels - len(gone))
        return tuple(
            Attribute(module=path, name=key, value=min(widths[value]))
            for path, module in self.model.named_modules()
            if not type(module).__module__.startswith("torch.nn.modules")
            for key, value in vars(module).items()
            if type(value) is int and not key.startswith("_") and len(widths.get(value, ())) == 1
        )
