"""Answers and confidences of thousands of samples as a line of text, for `Measurement`."""

from __future__ import annotations

import base64
import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

MOST_CLASSES = 1 << 16
"""Class numbers are packed in two bytes."""


def pack_answers(answers: NDArray[np.int64]) -> str:
    """Class numbers, from 0 to 65,535, as little-endian uint16, zlib, base64."""
    assert answers.size == 0 or 0 <= answers.min() <= answers.max() < MOST_CLASSES, "whoever packs has checked"
    return _pack(answers.astype("<u2"))


def unpack_answers(packed: str) -> NDArray[np.int64]:
    """What `pack_answers` was given."""
    return np.frombuffer(_unpack(packed), dtype="<u2").astype(np.int64)


def pack_confidences(confidences: NDArray[np.float64]) -> str:
    """Probabilities as little-endian float16, zlib, base64; three digits remain."""
    return _pack(confidences.astype("<f2"))


def unpack_confidences(packed: str) -> NDArray[np.float64]:
    """What `pack_confidences` was given, rounded to float16."""
    return np.frombuffer(_unpack(packed), dtype="<f2").astype(np.float64)


def _pack(array: NDArray[Any]) -> str:
    return base64.b64encode(zlib.compress(array.tobytes())).decode()


def _unpack(packed: str) -> bytes:
    return zlib.decompress(base64.b64decode(packed))
