"""How many channels each group loses, so that a target is met, and which."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from compress.config.prune import Normalization, Ranking
from compress.methods.groups import ChannelGroup
from compress.methods.importance import lowest
from compress.methods.ranking import below, isomorphic, normalised

Kept: TypeAlias = Mapping[str, int]
"""How many channels stay, by group."""
_SEARCH_STEPS = 40
_NEAR = 0.01
"""How far below a target, as a fraction of it, is near enough."""
_ROUNDING = 1e-9
"""0.07 × 100 is a little more than 7: no reason to keep another multiple."""


@dataclass(frozen=True)
class Bounds:
    """What one group does not go beyond; fractions are those of its channels before the first cut."""

    multiple: int
    """Channels that stay are a multiple of this."""
    floor: float
    """Fraction of its channels that it keeps at least, 0 to 1."""
    ceiling: float = 1.0
    """Fraction of its channels that it keeps at most, 0 to 1."""


@dataclass(frozen=True)
class Limits:
    """What no group goes beyond."""

    multiple: int
    """Channels that stay are a multiple of this."""
    floor: float
    """Fraction of its channels that a group keeps at least, 0 to 1."""
    of: Mapping[str, Bounds] = field(default_factory=dict)
    """Those of groups that have their own, by name."""
    whole: Mapping[str, int] = field(default_factory=dict)
    """Channels of the groups before the first cut, by name; those that are not here have lost none."""
    pressure: float = 1.0
    """How much of what ceilings ask for must be gone by now, 0 to 1: earlier cuts do a part of it."""

    def bounds(self, group: ChannelGroup) -> Bounds:
        """Those of this group."""
        return self.of.get(group.name, Bounds(self.multiple, self.floor))

    def channels(self, group: ChannelGroup) -> int:
        """How many it had before the first cut."""
        return self.whole.get(group.name, group.channels)

    def multiple_of(self, group: ChannelGroup) -> int:
        """The multiple, such that blocks (heads) keep equally many."""
        return math.lcm(self.bounds(group).multiple, group.blocks)

    def range(self, group: ChannelGroup) -> tuple[int, int]:
        """The fewest and the most channels that may stay; the fewest are more where no multiple lies within its bounds."""
        multiple, whole, bounds = self.multiple_of(group), self.channels(group), self.bounds(group)
        least = min(whole, multiple * max(1, math.ceil(whole * bounds.floor / multiple - _ROUNDING)))
        if bounds.ceiling >= 1:
            return least, whole
        now = 1 - (1 - bounds.ceiling) * self.pressure
        most = multiple * math.floor(whole * now / multiple + _ROUNDING)
        return least, most if self.pressure >= 1 else max(least, most)

    def kept(self, group: ChannelGroup, wanted: float) -> int:
        """Channels that stay of a group: the multiple nearest to `wanted` within its bounds, not more than there are."""
        multiple, (least, most) = self.multiple_of(group), self.range(group)
        nearest = multiple * math.floor(wanted / multiple + 0.5)
        return min(group.channels, max(min(nearest, most), least))

    def on_trial(self) -> Limits:
        """Multiples alone: whether channels can go does not depend on how many may."""
        return Limits(self.multiple, 0.0, {name: Bounds(found.multiple, 0.0) for name, found in self.of.items()})


class Size:
    """What a model costs after channels were removed, counted from the shapes that its weights will have."""

    def __init__(self, model: nn.Module, positions: Mapping[str, int], parameters: int, macs: int) -> None:
        """Take the whole model, the output positions of its layers, and what it costs now."""
        self._model, self._positions, self._parameters, self._macs = model, positions, parameters, macs

    def remains(
        self, groups: Sequence[ChannelGroup], removed: Mapping[str, Sequence[int]], what: Literal["macs", "parameters"]
    ) -> float:
        """Fraction of the MACs or parameters that remains."""
        gone = {name: set(indices) for name, indices in removed.items()}
        cut: dict[str, dict[int, set[int]]] = {}
        for group in groups:
            for item in group.coupled:
                slices = {s for s, root in zip(item.slices, item.roots, strict=True) if root in gone[group.name]}
                # Where channels are concatenated, several groups cut the same axis.
                cut.setdefault(item.tensor, {}).setdefault(item.axis, set()).update(slices)
        saved_parameters = saved_macs = 0
        for name, axes in cut.items():
            tensor = self._model.get_parameter(name)
            left = math.prod(size - len(axes.get(axis, ())) for axis, size in enumerate(tensor.shape))
            layer, _, leaf = name.rpartition(".")
            positions = self._positions.get(layer, 0) if leaf.endswith("weight") else 0
            saved_parameters += tensor.numel() - left
            saved_macs += (tensor.numel() - left) * positions
        if what == "parameters":
            return 1 - saved_parameters / self._parameters
        return 1 - saved_macs / max(1, self._macs)


class Selection:
    """Chooses channels by their scores."""

    def __init__(
        self,
        groups: Sequence[ChannelGroup],
        scores: Mapping[str, Tensor],
        limits: Limits,
        ranking: Ranking,
        normalisation: Normalization,
        kinds: Mapping[str, Hashable],
        plan: Callable[[float], Mapping[str, float]] | None = None,
    ) -> None:
        """Rank the channels.

        Args:
            groups: those that may be pruned.
            scores: of their channels, by group.
            limits: what no group goes beyond.
            ranking: `local` takes the same fraction of every group; `global` the lowest of all channels; `isomorphic` the
                lowest of those in groups of one kind, the same fraction of each kind; `sensitivity` follows the plan.
            normalisation: of the scores before groups are compared.
            kinds: what must be equal for two groups to be of one kind, by group.
            plan: for `sensitivity`: channels that stay of each group at a ratio of 0 to 1, in the limits or not.
        """
        self.groups = list(groups)
        self._scores, self._limits, self._plan = scores, limits, plan
        self._shared: list[tuple[list[ChannelGroup], Tensor]] = []
        self._normalised: dict[str, Tensor] = {}
        if ranking in ("global", "isomorphic") and groups:
            self._normalised = {group.name: normalised(scores[group.name], normalisation) for group in groups}
            by_name = {group.name: group for group in groups}
            names = [list(by_name)] if ranking == "global" else isomorphic({name: kinds[name] for name in by_name})
            for some in names:
                together = torch.cat([self._normalised[name] for name in some]).sort().values
                self._shared.append(([by_name[name] for name in some], together))

    def at(self, ratio: float) -> dict[str, int]:
        """Channels that stay of each group where `ratio` (0 to 1) of them all is to be gone, as far as the limits allow.

        That is of all before the first cut: what earlier cuts took counts.
        """
        limits = self._limits
        if self._plan is not None:
            planned = self._plan(ratio)
            return {group.name: limits.kept(group, planned[group.name]) for group in self.groups}
        if not self._shared:
            return {group.name: limits.kept(group, limits.channels(group) * (1 - ratio)) for group in self.groups}
        kept = {}
        for groups, together in self._shared:
            whole = sum(limits.channels(group) for group in groups)
            goes = round(ratio * whole) - (whole - len(together))
            threshold = together[min(len(together) - 1, max(0, goes))]
            for group in groups:
                lower = below(self._normalised[group.name], float(threshold))
                kept[group.name] = limits.kept(group, group.channels - lower)
        return kept

    def removed(self, kept: Kept) -> dict[str, list[int]]:
        """The channels to remove: of each group those with the lowest scores."""
        return {
            group.name: lowest(self._scores[group.name], group.channels - kept[group.name], group.blocks)
            for group in self.groups
        }

    def meeting(self, target: float, remains: Callable[[Kept], float]) -> Kept | None:
        """The most channels that can stay while `remains` is at most `target`; None where it never is.

        What remains falls with the ratio in steps, as many groups lose a multiple at once. So the last step is taken group by
        group, those first that lose the lowest scores for it, and only as far as the target needs. A residual stream is one group
        of a large part of the work: where its step goes far beyond the target, others get channels back, a multiple in turn,
        those first whose scores are the highest.
        """
        low, high = 0.0, 1.0
        if remains(self.at(high)) > target:
            return None
        if remains(self.at(low)) <= target:
            return self.at(low)
        for _ in range(_SEARCH_STEPS):
            middle = (low + high) / 2
            low, high = (middle, high) if remains(self.at(middle)) > target else (low, middle)
        kept, goal = dict(self.at(low)), self.at(high)
        for group in sorted(self.groups, key=lambda each: self._lost(each, kept[each.name], goal[each.name])):
            kept[group.name] = goal[group.name]
            if (left := remains(kept)) <= target:
                break
        return kept if left >= target * (1 - _NEAR) else self._refilled(kept, target, remains)

    def _refilled(self, kept: dict[str, int], target: float, remains: Callable[[Kept], float]) -> dict[str, int]:
        """As many channels more as the target allows."""
        growing = list(self.groups)
        while growing:
            order = sorted(growing, key=lambda each: self._next(each, kept[each.name]), reverse=True)
            growing = []
            for group in order:
                # The last step of a width that is no multiple is a smaller one: whole a group may always be.
                more = min(group.channels, kept[group.name] + self._limits.multiple_of(group))
                wider = {**kept, group.name: more}
                if kept[group.name] < more <= self._limits.range(group)[1] and remains(wider) <= target:
                    kept = wider
                    growing.append(group)
        return kept

    def _next(self, group: ChannelGroup, kept: int) -> float:
        """The share of a group's scores that its next channels hold."""
        wider = min(group.channels, kept + self._limits.multiple_of(group))
        return self._lost(group, wider, kept)

    def _lost(self, group: ChannelGroup, before: int, after: int) -> float:
        """Share of a group's scores that goes with its next channels."""
        scores = self._scores[group.name].double().sort().values
        gone = scores[group.channels - before : group.channels - after].sum()
        return float(gone / scores.sum()) if scores.sum() > 0 else 0.0
