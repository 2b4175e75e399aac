"""How far the answers of one model lie from another's, finer than by counting the answers that changed."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray


def relative_error(found: NDArray[np.floating[Any]], expected: NDArray[np.floating[Any]]) -> float:
    """The norm of the difference of two models' logits over the norm of the expected ones, 0 or more.

    Both norms are Frobenius norms over all samples, after each sample's mean over the classes was taken off: softmax
    gives the same for logits that are all shifted by one number.

    Args:
        found: logits (n, classes).
        expected: logits of the same shape.

    Returns:
        0 where both are the same; infinite where only the expected ones do not differ between classes; NaN where any are.
    """
    first, second = (
        logits.astype(np.float64) - logits.mean(1, keepdims=True, dtype=np.float64) for logits in (found, expected)
    )
    difference, whole = float(np.linalg.norm(first - second)), float(np.linalg.norm(second))
    if difference == 0.0:
        return 0.0
    return difference / whole if whole else math.inf
