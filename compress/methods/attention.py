"""Attention whose heads got narrower."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn


def head_widths(model: nn.Module) -> dict[str, int]:
    """Channels per head of each `nn.MultiheadAttention`, by name."""
    return {
        name: module.head_dim for name, module in model.named_modules() if isinstance(module, nn.MultiheadAttention)
    }


def keep_scale(model: nn.Module, before: Mapping[str, int]) -> None:
    """Scale the queries of heads that lost channels so that the softmax sees the products it saw, in place.

    Attention divides by the square root of the width of a head (Vaswani et al. 2017, arXiv:1706.03762, section 3.2.1).
    With fewer channels it divides by less, which would sharpen every softmax.

    Args:
        model: after surgery.
        before: the widths of the heads before, from `head_widths`.
    """
    with torch.no_grad():
        for name, width in head_widths(model).items():
            module = model.get_submodule(name)
            assert isinstance(module, nn.MultiheadAttention)
            if width != before[name] and module.in_proj_weight is not None:
                factor = (width / before[name]) ** 0.5
                module.in_proj_weight[: module.embed_dim] *= factor
                if module.in_proj_bias is not None:
                    module.in_proj_bias[: module.embed_dim] *= factor
