"""How long something takes whole and once it was made smaller."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

Timer = Callable[[Mapping[str, tuple[nn.Module, tuple[int, ...]]]], Mapping[str, Sequence[float]]]
"""Milliseconds, 0 or more, of a call of each of these modules on an input of that shape, the batch first; by name.

They take turns in rounds: of each module a number for every round, equally many of all.
"""


@dataclass(frozen=True)
class Times:
    """Of a layer or a model, in milliseconds, 0 or more."""

    before_ms: float
    after_ms: float

    @classmethod
    def of(cls, before: Sequence[float], after: Sequence[float]) -> Times:
        """Medians over rounds."""
        return cls(statistics.median(before), statistics.median(after))

    @property
    def share(self) -> float:
        """The fraction of its time that remains."""
        return self.after_ms / self.before_ms if self.before_ms > 0 else 1.0

    def __str__(self) -> str:
        return f"{self.before_ms:.3g} → {self.after_ms:.3g} ms"
