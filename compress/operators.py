"""Where the time of a profiled call goes: by operator, and by what the nodes compute in. Pure functions of a `Profile`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final, Literal, TypeVar

from compress.measured import OperatorTime, Profile

Kind = Literal["int8", "float", "convert"]
KINDS: Final[tuple[Kind, ...]] = ("int8", "float", "convert")

_Group = TypeVar("_Group", str, tuple[str, Kind])


@dataclass(frozen=True)
class OperatorShare:
    """All nodes of one operator and kind together."""

    operator: str
    kind: Kind
    count: int
    """Nodes."""
    milliseconds: float
    share: float
    """Of the sum over all nodes, 0 to 1."""


@dataclass(frozen=True)
class KindShare:
    """All nodes of one kind together."""

    kind: Kind
    count: int
    milliseconds: float
    share: float
    """Of the sum over all nodes, 0 to 1."""


def by_operator(profile: Profile) -> tuple[OperatorShare, ...]:
    """Time per operator and kind, the longest first; equal ones by name.

    An operator that runs in int8 at some nodes and in float at others has an entry for each.
    """
    found = [
        OperatorShare(operator, kind, len(nodes), _milliseconds(nodes), _share(nodes, profile))
        for (operator, kind), nodes in _grouped(profile, lambda node: (node.operator, node.kind)).items()
    ]
    return tuple(sorted(found, key=lambda each: (-each.milliseconds, each.operator, each.kind)))


def by_kind(profile: Profile) -> tuple[KindShare, ...]:
    """Time in int8, in float and in conversion between them, in this order, also where there is none."""
    groups = _grouped(profile, lambda node: node.kind)
    return tuple(
        KindShare(kind, len(nodes), _milliseconds(nodes), _share(nodes, profile))
        for kind, nodes in ((kind, groups.get(kind, [])) for kind in KINDS)
    )


def _grouped(profile: Profile, group: Callable[[OperatorTime], _Group]) -> dict[_Group, list[OperatorTime]]:
    groups: dict[_Group, list[OperatorTime]] = {}
    for node in profile.nodes:
        groups.setdefault(group(node), []).append(node)
    return groups


def _milliseconds(nodes: Iterable[OperatorTime]) -> float:
    return sum(node.milliseconds for node in nodes)


def _share(nodes: Iterable[OperatorTime], profile: Profile) -> float:
    total = _milliseconds(profile.nodes)
    return _milliseconds(nodes) / total if total else 0.0
