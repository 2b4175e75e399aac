"""How much each group loses where what it costs alone decides: most from those that cost least for what they save."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from compress.measured import GroupSensitivity, PruningSensitivity
from compress.methods.groups import ChannelGroup
from compress.methods.ratio_allocation import Step, allocate_ratios
from compress.pruning.selection import Limits
from compress.pruning.surgeon import Removed

_ENDS = 3
"""Groups that are named of those that lose most and least."""
_STEPS = 16
"""Widths of a group that are weighed; what lies between them is left to the last steps towards the target."""
_NOT_FOR_NOTHING = 1e-3
"""Points that losing all of a group costs in any case: what seems to cost nothing goes only as far as the target needs."""
_PARTS = 1_000_000_000
"""Units in which a saved fraction is counted, as the allocation wants whole numbers."""


class Allotment:
    """Channels that stay of each group, for any saving."""

    def __init__(
        self,
        found: PruningSensitivity,
        groups: Sequence[ChannelGroup],
        limits: Limits,
        remains: Callable[[ChannelGroup, int], float],
    ) -> None:
        """Predict what every width of every group costs.

        Args:
            found: what the groups cost; those that are not in it stay whole.
            groups: of the model, as they are now.
            limits: what no group goes beyond.
            remains: the fraction of the model that remains where only this group keeps this many channels.
        """
        self._channels = {group.name: group.channels for group in groups}
        known = {group.name: group for group in found.groups}
        self._steps: dict[str, list[Step]] = {}
        for group in groups:
            if group.name not in known:
                continue
            least, _ = limits.range(group)
            widths = np.linspace(group.channels, min(least, group.channels), _STEPS + 1)[1:]
            kept = sorted({limits.kept(group, float(width)) for width in widths} - {group.channels})
            self._steps[group.name] = [
                Step(
                    ratio=1 - width / group.channels,
                    saved=max(0, round((1 - remains(group, width)) * _PARTS)),
                    loss=_loss(found.percent, known[group.name], 1 - width / group.channels),
                )
                for width in kept
            ]
        self._most = sum(max((step.saved for step in steps), default=0) for steps in self._steps.values())

    def at(self, share: float) -> Mapping[str, float]:
        """Channels that stay of each group, by name, where `share` (0 to 1) of all that can be saved is saved."""
        ratios = allocate_ratios(self._steps, int(share * self._most))
        return {name: channels * (1 - ratios.get(name, 0.0)) for name, channels in self._channels.items()}

    def loss(self, kept: Mapping[str, int]) -> float:
        """Points of accuracy that these widths are predicted to cost, nothing trained: the sum over groups."""
        total = 0.0
        for name, steps in self._steps.items():
            ratio = 1 - kept[name] / self._channels[name]
            shares = [0.0, *(step.ratio for step in sorted(steps, key=lambda step: step.ratio))]
            losses = [0.0, *(step.loss for step in sorted(steps, key=lambda step: step.ratio))]
            total += float(np.interp(ratio, shares, losses))
        return total


def _loss(percent: float, group: GroupSensitivity, ratio: float) -> float:
    return max(0.0, predicted_loss(percent, group, ratio)) + _NOT_FOR_NOTHING * ratio


def predicted_loss(percent: float, group: GroupSensitivity, ratio: float) -> float:
    """Points lost without a fraction of a group's channels (0 to 1): between what was measured by straight lines.

    Beyond the last ratio that was measured, towards no accuracy at all without any channel.

    Args:
        percent: accuracy with all channels.
        group: what was measured.
        ratio: the fraction.
    """
    shares = [0.0, *(step.silenced / group.channels for step in group.steps), 1.0]
    percents = [percent, *(step.percent for step in group.steps), 0.0]
    return percent - float(np.interp(ratio, shares, percents))


def with_removed(costs: PruningSensitivity, removed: Removed) -> PruningSensitivity:
    """The same, of the groups that were cut or could have been, with how many channels each loses."""
    groups = (
        group.model_copy(update={"removed": len(removed[group.name])})
        for group in costs.groups
        if group.name in removed
    )
    return costs.model_copy(update={"groups": tuple(groups)})


def told(costs: PruningSensitivity, removed: Removed, predicted: float) -> str:
    """What was chosen, and why: the groups that lose most and least of their channels, and what half of them costs."""
    groups = [group for group in costs.groups if group.name in removed]
    by_share = sorted(groups, key=lambda group: -len(removed[group.name]) / group.channels)

    def words(some: Sequence[GroupSensitivity]) -> str:
        return ", ".join(
            f"{group.name} {len(removed[group.name])} of {group.channels} ({_half(costs, group):+.1f} points)"
            for group in some
        )

    ends = min(_ENDS, len(by_share) // 2)
    parts = [f"most of {words(by_share[:ends])}", f"least of {words(by_share[len(by_share) - ends :])}"] if ends else []
    text = "; ".join((f"shares by what each group costs alone on {costs.n} validation samples", *parts))
    return f"{text}; in brackets half of it silenced, alone; {predicted:.1f} points of loss predicted, untrained"


def _half(costs: PruningSensitivity, group: GroupSensitivity) -> float:
    return min(group.steps, key=lambda step: abs(step.ratio - 0.5)).percent - costs.percent
