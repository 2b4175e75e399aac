"""Which entry of `prune.layers` a group of channels goes by."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Sequence

from compress.config.prune import LayerLimits
from compress.errors import nearest


def limits_for(layers: Sequence[str], entries: Sequence[LayerLimits]) -> LayerLimits | None:
    """The first entry that matches any of the layers which make the channels of a group."""
    return next((entry for entry in entries if _matches(entry, layers)), None)


def warn_of_idle_limits(
    entries: Sequence[LayerLimits], groups: Sequence[Sequence[str]], warn: Callable[[str], None]
) -> None:
    """Name the entries that are the first match of no group: most likely a slip of the pen.

    Args:
        entries: in their order.
        groups: of each group of channels the layers that make them.
        warn: told of each.
    """
    used = {id(limits_for(layers, entries)) for layers in groups}
    names = sorted({name for layers in groups for name in layers})
    for index, entry in enumerate(entries):
        if id(entry) in used:
            continue
        if any(_matches(entry, layers) for layers in groups):
            warn(f"prune.layers.{index}: '{entry.match}' is never read: entries before it match the same layers")
        else:
            warn(
                f"prune.layers.{index}: '{entry.match}' matches no layer whose channels may go{nearest(entry.match, names)}"
            )


def _matches(entry: LayerLimits, layers: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, entry.match) for name in layers)
