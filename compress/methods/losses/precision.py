"""Losses are computed in single precision at least, whatever the layers before them compute in."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def at_least_single(tensor: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """The tensor in float32 where it is in half precision, unchanged otherwise.

    Sums of squares overflow float16 at features of 256, and bfloat16 keeps three decimals of a loss.
    """
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
