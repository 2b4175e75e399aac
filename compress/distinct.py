"""Short names for things that lie in folders, different for different things."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

Parts = tuple[str, ...]


def distinct(places: Sequence[Parts]) -> list[str]:
    """A name for each place, no two the same.

    The last part of a place is its name: ("runs", "digits", "prune") is 'prune'. Places that share it get as many of
    the parts before it as tell them apart: 'digits/prune' and 'cifar/prune'. The same place a second time is 'prune (2)'.

    Args:
        places: What leads to each thing, from the outermost part inwards; at least one part each.
    """
    depths = dict.fromkeys(places, 1)
    while True:
        taken = Counter(_name(place, depth) for place, depth in depths.items())
        shared = [place for place, depth in depths.items() if taken[_name(place, depth)] > 1 and depth < len(place)]
        if not shared:
            break
        for place in shared:
            depths[place] += 1
    names: list[str] = []
    for place in places:
        name = first = _name(place, depths[place])
        number = 1
        while name in names:
            number += 1
            name = f"{first} ({number})"
        names.append(name)
    return names


def _name(place: Parts, depth: int) -> str:
    return "/".join(place[-depth:])
