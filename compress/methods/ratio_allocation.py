"""Which fraction of its channels each group loses, so that enough work is saved at little predicted loss. Pure functions.

What a group costs at each fraction is measured with all others whole (Li et al. 2017, arXiv:1608.08710, section 3.2, look at
layers in this way). Losses are added up over groups, and so is the work saved: a prediction, no measurement. Neighbours that
lose channels together save less than the sum, because the weights between them go only once, and may lose more or less
accuracy than the sum.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from compress.methods.rank_allocation import Option, allocate


@dataclass(frozen=True)
class Step:
    """A group without a fraction of its channels, all others whole."""

    ratio: float
    """Fraction of its channels that goes, above 0."""
    saved: int
    """Multiply-accumulates, 0 or more."""
    loss: float
    """Accuracy lost, in any unit, the same for all groups. Below 0, where accuracy was gained by chance, it counts as 0."""


def allocate_ratios(steps: Mapping[str, Sequence[Step]], saving: int) -> dict[str, float]:
    """Choose a ratio for each group so that together they save enough, at little total loss.

    The multiple-choice knapsack problem of `compress.methods.rank_allocation`, with the bounds that stand there: the total
    loss is at most the least possible one plus that of a single step between neighbouring corners of a group's lower convex
    hull, and never grows when less has to be saved.

    Args:
        steps: by group, in any order; no steps mean that the group stays whole, which each of them may.
        saving: multiply-accumulates to save at least.

    Returns:
        The ratio of each group; 0 for those that stay whole.

    Raises:
        ValueError: where that much cannot be saved, naming what can; where a step saves less than nothing, or its loss is
            not finite.
    """
    for name, choices in steps.items():
        if wrong := [step.saved for step in choices if step.saved < 0]:
            raise ValueError(
                f"'{name}' has a step that saves {wrong[0]} multiply-accumulates; none may save less than 0"
            )
    most = {name: max((step.saved for step in choices), default=0) for name, choices in steps.items()}
    reachable = sum(most.values())
    if saving > reachable:
        raise ValueError(f"{saving:,} multiply-accumulates cannot be saved: the most is {reachable:,}")
    options = {
        name: [Option(most[name], 0.0), *(Option(most[name] - step.saved, max(step.loss, 0.0)) for step in choices)]
        for name, choices in steps.items()
    }
    chosen = allocate(options, reachable - saving)
    return {name: steps[name][index - 1].ratio if index else 0.0 for name, index in chosen.items()}
