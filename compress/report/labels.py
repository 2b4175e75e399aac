"""Where the names of marks go, so that they cover neither each other nor the marks. Lengths are points."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

NEAR = 9.0
_DISTANCES = (NEAR, 16.0, 26.0, 38.0, 52.0, 68.0)
# Right and left first: a name reads best beside its mark.
_DIRECTIONS = ((1, 0), (-1, 0), (0.8, 0.8), (-0.8, 0.8), (0.8, -0.8), (-0.8, -0.8), (0, 1), (0, -1))
_OUTSIDE = 4.0
"""Cost of leaving the frame, per area, against 1 for covering something."""
_CROSSED = 12.0
"""Cost of a line to a far name that runs over something."""


@dataclass(frozen=True)
class Box:
    """Axis-aligned rectangle."""

    left: float
    bottom: float
    right: float
    top: float

    def shared(self, other: Box) -> float:
        """Area that two boxes share."""
        width = min(self.right, other.right) - max(self.left, other.left)
        height = min(self.top, other.top) - max(self.bottom, other.bottom)
        return max(0.0, width) * max(0.0, height)

    def holds(self, x: float, y: float) -> bool:
        """Whether a position lies in the box."""
        return self.left <= x <= self.right and self.bottom <= y <= self.top

    @property
    def area(self) -> float:
        """Width times height."""
        return (self.right - self.left) * (self.top - self.bottom)


@dataclass(frozen=True)
class Offset:
    """Where a name stands, from its mark."""

    dx: float
    dy: float
    horizontal: Literal["left", "center", "right"]
    is_far: bool


def width_of(name: str, font_size: float) -> float:
    """Estimated width of a name: the reader's font is not known here."""
    return 0.56 * font_size * len(name) + 3


def place(
    anchors: Sequence[tuple[float, float]],
    sizes: Sequence[tuple[float, float]],
    taken: Sequence[Box],
    inside: Box,
) -> list[Offset]:
    """An offset for each name, in order, each the cheapest that is left; nearer wins among equals.

    Args:
        anchors: Centre of each mark.
        sizes: Width and height of each name.
        taken: What no name should cover.
        inside: Where names should stay.
    """
    covered = list(taken)
    offsets = []
    for anchor, extent in zip(anchors, sizes, strict=True):
        best, box, least = None, None, float("inf")
        for rank, offset in enumerate(_candidates()):
            candidate = _box(anchor, extent, offset)
            cost = sum(candidate.shared(other) for other in covered) + 0.3 * rank
            cost += _CROSSED * _crossed(anchor, offset, covered)
            cost += _OUTSIDE * (candidate.area - candidate.shared(inside))
            if cost < least:
                best, box, least = offset, candidate, cost
        assert best is not None
        assert box is not None
        offsets.append(best)
        covered.append(box)
    return offsets


def _candidates() -> list[Offset]:
    offsets = []
    for distance in _DISTANCES:
        for right, up in _DIRECTIONS:
            horizontal: Literal["left", "center", "right"] = "left" if right > 0 else "right" if right < 0 else "center"
            # A name above or below its mark needs half its own height more than one beside it.
            dy = up * distance + (4.0 if right == 0 and up > 0 else -4.0 if right == 0 else 0.0)
            offsets.append(Offset(right * distance, dy, horizontal, distance > NEAR))
    return offsets


def _crossed(anchor: tuple[float, float], offset: Offset, covered: Sequence[Box]) -> int:
    """How many boxes the line from a mark to its far name runs over, those at the mark itself aside."""
    if not offset.is_far:
        return 0
    x, y = anchor
    steps = [(x + offset.dx * step / 16, y + offset.dy * step / 16) for step in range(2, 16)]
    others = (box for box in covered if not box.holds(x, y))
    return sum(any(box.holds(*at) for at in steps) for box in others)


def _box(anchor: tuple[float, float], extent: tuple[float, float], offset: Offset) -> Box:
    width, height = extent
    x, y = anchor[0] + offset.dx, anchor[1] + offset.dy
    left = {"left": x, "center": x - width / 2, "right": x - width}[offset.horizontal]
    return Box(left, y - height / 2, left + width, y + height / 2)
