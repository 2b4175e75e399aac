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
    if not items:
        return []
    reason = why_not(items)
    if reason is None:
        return []
    if len(items) == 1:
        return [(items[0], reason)]
    middle = len(items) // 2
    return find_broken(items[:middle], why_not) + find_broken(items[middle:], why_not)
