"""How much accuracy each group of channels costs on its own, before it is cut."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor, nn

from compress.measured import GroupSensitivity, PruningSensitivity, SilencedChannels
from compress.methods.groups import ChannelGroup
from compress.methods.importance import lowest
from compress.methods.silence import silence

RATIOS = (0.25, 0.5, 0.75)


def sensitivities(
    model: nn.Module,
    groups: Sequence[ChannelGroup],
    scores: Mapping[str, Tensor],
    ratios: Sequence[float],
    percent: Callable[[nn.Module], float],
    n: int,
) -> PruningSensitivity:
    """Silence the lowest-scored channels of one group at a time, and measure.

    Silencing means what removing does (`compress.methods.silence`), so that nothing has to be cut. The model is evaluated
    once, and once for each group and ratio; a ratio that silences as many channels as the one before it costs nothing.

    Args:
        model: whole; it is left as it was.
        groups: of this model, each with weights that read it.
        scores: of the channels, (channels,), by group; the lowest go first.
        ratios: fractions of a group's channels, each above 0 and below 1.
        percent: accuracy of a model on samples of validation; the model may be moved, not trained.
        n: how many samples these are.

    Raises:
        ValueError: where nothing is known to read a group, or a ratio is out of range.
    """
    if unread := [group.name for group in groups if not group.is_read]:
        raise ValueError(f"'{unread[0]}' cannot be silenced: no weights are known that read it")
    if wrong := [ratio for ratio in ratios if not 0.0 < ratio < 1.0]:
        raise ValueError(f"ratios must be above 0 and below 1, got {wrong[0]}")
    whole = percent(copy.deepcopy(model))
    found = []
    for group in groups:
        known = {0: whole}
        steps = []
        for ratio in ratios:
            removed = silenced_channels(group, scores[group.name], ratio)
            count = len(removed)
            if count not in known:
                known[count] = percent(silence(copy.deepcopy(model), [group], {group.name: removed}))
            steps.append(SilencedChannels(ratio=ratio, silenced=count, percent=known[count]))
        found.append(GroupSensitivity(name=group.name, channels=group.channels, removed=0, steps=tuple(steps)))
    return PruningSensitivity(n=n, percent=whole, groups=tuple(found))


def silenced_channels(group: ChannelGroup, scores: Tensor, ratio: float) -> list[int]:
    """Which channels a ratio of a group is: the lowest scores, equally many of each block, at least one of which stays."""
    each = group.channels // group.blocks
    return lowest(scores, group.blocks * min(round(ratio * each), each - 1), group.blocks)
