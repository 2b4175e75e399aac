"""How much accuracy each group of channels costs on its own, before anything is cut or trained."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from compress.methods.groups import ChannelGroup
from compress.methods.importance import lowest
from compress.methods.silence import silence

RATIOS = (0.25, 0.5, 0.75)


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class SilencedGroup(_Part):
    """The model with a fraction of one group's channels silenced, all others whole."""

    ratio: float = Field(gt=0.0, lt=1.0)
    """Fraction of its channels that was asked for."""
    silenced: int = Field(ge=0)
    """Channels: that fraction of them, rounded; equally many in each block, and never all."""
    accuracy: float
    """As the evaluation gives it."""


class GroupSensitivities(_Part):
    """What silencing each group costs."""

    whole: float
    """Accuracy of the model with all its channels."""
    groups: dict[str, tuple[SilencedGroup, ...]]
    """By name, in the order of the ratios."""

    def loss(self, group: str) -> tuple[float, ...]:
        """What a group loses at each ratio; below 0 where accuracy was gained."""
        return tuple(self.whole - each.accuracy for each in self.groups[group])


def sensitivities(
    model: nn.Module,
    groups: Sequence[ChannelGroup],
    scores: Mapping[str, Tensor],
    ratios: Sequence[float],
    evaluate: Callable[[nn.Module], float],
) -> GroupSensitivities:
    """Silence the lowest-scored channels of one group at a time, and measure.

    Silencing means what removing does (`compress.methods.silence`), so that nothing has to be cut. The model is evaluated
    once, and once for each group and ratio; a ratio that silences as many channels as the one before it costs nothing.

    Args:
        model: whole; it is left as it was.
        groups: of this model, each with weights that read it.
        scores: of the channels, (channels,), by group; the lowest go first.
        ratios: fractions of a group's channels, each above 0 and below 1.
        evaluate: accuracy of a model, such as on a sample of validation, in any unit; the model may be moved, not trained.

    Raises:
        ValueError: where nothing is known to read a group, or a ratio is out of range.
    """
    if unread := [group.name for group in groups if not group.is_read]:
        raise ValueError(f"'{unread[0]}' cannot be silenced: no weights are known that read it")
    if wrong := [ratio for ratio in ratios if not 0.0 < ratio < 1.0]:
        raise ValueError(f"ratios must be above 0 and below 1, got {wrong[0]}")
    whole = evaluate(copy.deepcopy(model))
    found: dict[str, tuple[SilencedGroup, ...]] = {}
    for group in groups:
        known = {0: whole}
        measured = []
        for ratio in ratios:
            count = silenced_channels(group, ratio)
            if count not in known:
                removed = lowest(scores[group.name], count, group.blocks)
                known[count] = evaluate(silence(copy.deepcopy(model), [group], {group.name: removed}))
            measured.append(SilencedGroup(ratio=ratio, silenced=count, accuracy=known[count]))
        found[group.name] = tuple(measured)
    return GroupSensitivities(whole=whole, groups=found)


def silenced_channels(group: ChannelGroup, ratio: float) -> int:
    """How many channels a ratio of a group is: equally many of each block, at least one of which stays."""
    each = group.channels // group.blocks
    return group.blocks * min(round(ratio * each), each - 1)
