"""Find what breaks by trying: which of many changes cannot be made."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

Item = TypeVar("Item")


def find_broken(items: Sequence[Item], why_not: Callable[[Sequence[Item]], str | None]) -> list[tuple[Item, str]]:
    """The items that fail, each with its reason, by trying all at once and halving whatever fails.

    With k broken among n items it takes about k · log2(n) trials instead of n.

    Args:
        items: changes that can be tried in any combination.
        why_not: tries some of them together; None where they work, else the reason.
    """
    reason = why_not(items) if items else None
    if reason is None:
        return []
    broken = _halve(items, reason, why_not)
    lost = {id(item) for item, _ in broken}
    good = [item for item in items if id(item) not in lost]
    if not good or why_not(good) is None:
        return broken
    # Some fail only together: take them in one by one and leave out the one that tips it over.
    together: list[Item] = []
    for item in good:
        reason = why_not([*together, item])
        if reason is None:
            together.append(item)
        else:
            broken.append((item, reason))
    return broken


def _halve(
    items: Sequence[Item], reason: str, why_not: Callable[[Sequence[Item]], str | None]
) -> list[tuple[Item, str]]:
    """The items that fail on their own; `items` together are known to fail for `reason`."""
    if len(items) == 1:
        return [(items[0], reason)]
    middle = len(items) // 2
    broken = []
    for half in (items[:middle], items[middle:]):
        found = why_not(half)
        if found is not None:
            broken += _halve(half, found, why_not)
    return broken
