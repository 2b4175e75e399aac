"""`prune`: remove whole channels, the lowest scores first, then recover the accuracy by training."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from compress import surgery
from compress.checkpoint import Checkpoint, Draft
from compress.config import PruneConfig
from compress.edits import Edit
from compress.errors import StageError
from compress.methods.groups import ChannelGraph, ChannelGroup, copy_on_cpu, l1_scores, why_unprunable
from compress.methods.importance import lowest
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
    surgery.apply_all(model, edits)
    check_forward(model, example, len(context.data.classes), "prune: the pruned model")
    pruned = f"{sum(map(bool, removed.values()))} of {len(removed) + len(pruner.left_alone)} groups pruned"
    context.note(f"{what_remains(before, cost_of(model, example))}; {pruned}")
    training = recover(model, config.recovery, context)
    return Draft(parent.arch, (*parent.edits, *edits), model, training=training)


class _Pruner:
    """Finds the groups that can go, and how much of each has to."""

    def __init__(self, model: nn.Module, example: Tensor, config: PruneConfig, context: Context) -> None:
        self.model, self.example, self.config = copy_on_cpu(model), example, config
        self.before = cost_of(self.model, example)
        self.left_alone: dict[str, str] = {}
        self.groups = self._prunable(context)
        self.order = {group.name: l1_scores(self.model, group) for group in self.groups}
        self.positions = output_positions(self.model, example)

    def why_nothing(self) -> str:
        """Which filter excluded the groups."""
        if self.groups:
            return f"no group can lose a multiple of {self.config.multiple} channels at this target"
        reasons = described(self.left_alone) or "there is no convolution or linear layer"
        return f"no group of channels can be pruned: {reasons}"

    def edits(self, removed: Removed) -> tuple[Edit, ...]:
        """What removing these channels means for every tensor."""
        if not any(removed.values()):
            return ()
        throwaway = copy_on_cpu(self.model)
        graph = ChannelGraph(throwaway, self.example)
        surgery.encode_positions(throwaway)
        return surgery.derive(self.model, graph.remove({name: gone for name, gone in removed.items() if gone}))

    def search(self) -> Removed:
        """Channels to remove from each group so that the target is met."""
        target = self.config.target
        if target.kind == "ratio":
            return self._removed(target.settings)
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
        return self._removed(high)

    def _removed(self, ratio: float) -> dict[str, list[int]]:
        return {
            group.name: lowest(self.order[group.name], group.channels - self._kept(group, ratio))
            for group in self.groups
        }

    def _kept(self, group: ChannelGroup, ratio: float) -> int:
        """Channels that stay: the nearest multiple, not below the floor, not above what there is."""
        multiple = self.config.multiple
        nearest = multiple * math.floor(group.channels * (1 - ratio) / multiple + 0.5)
        floor = multiple * math.ceil(group.channels * self.config.floor / multiple)
        return min(group.channels, max(nearest, floor, multiple))

    def _remains(self, ratio: float) -> float:
        """Fraction of MACs or parameters that remains, counted from the shapes that the weights will have."""
        removed = {name: set(gone) for name, gone in self._removed(ratio).items()}
        cut: dict[str, dict[int, set[int]]] = {}
        for group in self.groups:
            for item in group.coupled:
                gone = {s for s, root in zip(item.slices, item.roots, strict=True) if root in removed[group.name]}
                # Where channels are concatenated, several groups cut the same axis.
                cut.setdefault(item.layer, {}).setdefault(item.axis, set()).update(gone)
        saved = Cost(0, 0)
        for layer, axes in cut.items():
            weight = self.model.get_submodule(layer).get_parameter("weight")
            left = math.prod(size - len(axes.get(axis, ())) for axis, size in enumerate(weight.shape))
            parameters = weight.numel() - left
            saved = Cost(saved.parameters + parameters, saved.macs + parameters * self.positions.get(layer, 0))
        if self.config.target.kind == "parameters":
            return 1 - saved.parameters / self.before.parameters
        return 1 - saved.macs / max(1, self.before.macs)

    def _prunable(self, context: Context) -> list[ChannelGroup]:
        """Groups that survive a trial; the others are remembered with the reason, and named aloud."""
        try:
            found = list(ChannelGraph(copy_on_cpu(self.model), self.example).groups())
        except Exception as error:  # torch-pruning raises whatever it stumbles over
            reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no reason given'}"
            raise StageError(f"prune: torch-pruning cannot trace the dependencies of this model: {reason}") from error
        candidates = []
        for group in found:
            if pattern := self._protecting(group):
                self.left_alone[group.name] = f"protected by '{pattern}'"
            elif group.channels <= self.config.multiple:
                self.left_alone[group.name] = f"has {group.channels} channels, not more than the multiple"
            else:
                candidates.append(group)
        broken = find_broken(candidates, self._why_not)
        for group, reason in broken:
            self.left_alone[group.name] = reason
            if not reason.startswith("the outputs become"):  # the classes themselves are no surprise
                others = f" with {len(group.layers) - 1} layers behind it" if len(group.layers) > 1 else ""
                context.warn(
                    f"the channels of '{group.name}'{others} are left alone: pruning them breaks the model: {reason}"
                )
        refused = {group.name for group, _ in broken}
        return [group for group in candidates if group.name not in refused]

    def _protecting(self, group: ChannelGroup) -> str | None:
        return next(
            (p for p in self.config.protect if any(fnmatch.fnmatchcase(name, p) for name in group.producers)), None
        )

    def _why_not(self, groups: Sequence[ChannelGroup]) -> str | None:
        removed = {group.name: list(range(self.config.multiple)) for group in groups}
        return why_unprunable(lambda: copy_on_cpu(self.model), self.example, removed)
