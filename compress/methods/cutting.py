"""How far each of several cuts goes, so that the last one meets the target. Pure functions."""

from __future__ import annotations


def geometric(final: float, steps: int) -> list[float]:
    """What remains after each of `steps` cuts that all take the same fraction of what the one before left.

    The i-th of n leaves final^(i / n).

    Args:
        final: fraction of the whole that remains in the end, above 0 to 1.
        steps: number of cuts, 1 or more.
    """
    return [final ** (step / steps) for step in range(1, steps)] + [final]


def cubic(final: float, steps: int) -> list[float]:
    """What remains after each of `steps` cuts, where the fraction removed follows a cubic curve.

    The i-th of n removes s_i = s_f + (s_0 - s_f) (1 - i / n)³ of the whole, here with s_0 = 0: much as long as there is
    much to choose from, and little at the end.

    Source: Zhu & Gupta 2017, "To prune, or not to prune", arXiv:1710.01878, eq. 1.

    Args:
        final: fraction of the whole that remains in the end, 1 - s_f, above 0 to 1.
        steps: number of cuts, 1 or more.
    """
    return [final + (1.0 - final) * (1.0 - step / steps) ** 3 for step in range(1, steps)] + [final]
