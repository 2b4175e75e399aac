"""scikit-learn's bundled handwritten digits."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from sklearn.datasets import load_digits
from torch import Tensor

from compress.config.data import ONLY_INPUT, DigitsConfig
from compress.data.base import Input
from compress.data.memory import MemorySource, Rows


def read_digits(config: DigitsConfig) -> MemorySource:
    """The 1,797 digits as images (channels, image_size, image_size); stored as 8×8 and resized batch by batch."""
    bunch = load_digits()
    decode = functools.partial(decode_digits, size=config.image_size, channels=config.channels)
    images = Rows(
        Input(ONLY_INPUT, (config.channels, config.image_size, config.image_size)),
        (bunch.images / 16).astype(np.float32),
        decode,
        is_image=True,
    )
    classes = tuple(str(digit) for digit in range(10))
    return MemorySource(classes, {"train": bunch.target.astype(np.int64)}, {"train": (images,)})


def decode_digits(rows: npt.NDArray[Any], *, size: int, channels: int) -> Tensor:
    """Grey images (n, 8, 8) in [0, 1], resized bilinearly, as float32 (n, channels, size, size)."""
    images = torch.from_numpy(rows)[:, None]
    grown = torch.nn.functional.interpolate(images, size=(size, size), mode="bilinear", align_corners=False)
    return grown.repeat(1, channels, 1, 1)
