"""Attention with fewer channels in its heads, or with fewer heads."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import nn


def head_widths(model: nn.Module) -> dict[str, int]:
    """Channels per head of each `nn.MultiheadAttention`, by name."""
    return {
        name: module.head_dim for name, module in model.named_modules() if isinstance(module, nn.MultiheadAttention)
    }


def keep_scale(model: nn.Module, before: Mapping[str, int], dtype: torch.dtype | None = None) -> None:
    """Scale the queries of heads that lost channels so that the softmax sees the products it saw, in place.

    Attention divides by the square root of the width of a head (Vaswani et al. 2017, arXiv:1706.03762, section 3.2.1).
    With fewer channels it divides by less, which would sharpen every softmax.

    Args:
        model: after surgery.
        before: the widths of the heads before, from `head_widths`.
        dtype: what scaled weights become before they are scaled; None: what they are.
    """
    scaled: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}
    """What has been scaled and what it has become, by identity: a tensor that several modules share is scaled once."""
    for name, width in head_widths(model).items():
        module = model.get_submodule(name)
        assert isinstance(module, nn.MultiheadAttention)
        if width == before[name] or module.in_proj_weight is None:
            continue
        factor = (width / before[name]) ** 0.5
        for key in ("in_proj_weight", "in_proj_bias"):
            old = getattr(module, key)
            if old is None:
                continue
            if id(old) not in scaled:
                scaled[id(old)] = old, _scaled(old, slice(module.embed_dim), factor, dtype)
            setattr(module, key, scaled[id(old)][1])


def _scaled(parameter: nn.Parameter, queries: slice, factor: float, dtype: torch.dtype | None) -> nn.Parameter:
    """The parameter with some rows multiplied: itself, or another one where it gets another type."""
    with torch.no_grad():
        found = parameter if dtype is None else nn.Parameter(parameter.to(dtype))
        found[queries] *= factor
    return found


def fused(model: nn.Module) -> dict[str, nn.Module]:
    """Modules of attention that take queries, keys and values from one linear layer, by the name of that layer.

    They are known by what they hold, as timm's vision transformers do: `qkv`, which makes all queries, then all keys, then all
    values, each head after head; `proj`, which reads what the heads answer; and `num_heads`.
    """
    found = {}
    for name, module in model.named_modules():
        qkv, proj, heads = (getattr(module, key, None) for key in ("qkv", "proj", "num_heads"))
        if not (isinstance(qkv, nn.Linear) and isinstance(proj, nn.Linear) and type(heads) is int):
            continue
        if qkv.out_features == 3 * proj.in_features and heads > 0 and proj.in_features % heads == 0:
            found[f"{name}.qkv" if name else "qkv"] = module
    return found


def rows_of(module: nn.Module, heads: Iterable[int]) -> list[list[int]]:
    """For each head of a module that `fused` found, its channels among those that `proj` reads."""
    width = module.get_submodule("proj").get_parameter("weight").shape[1] // vars(module)["num_heads"]
    return [list(range(head * width, (head + 1) * width)) for head in heads]


def remove_heads(module: nn.Module, heads: Iterable[int]) -> None:
    """Take whole heads out of a module that `fused` found, in place.

    Their width stays, so the softmax sees the products it saw. Other numbers of the module that equal the width of all heads
    together become the new one.

    Raises:
        RuntimeError: where no head would be left.
    """
    qkv, proj = module.qkv, module.proj
    assert isinstance(qkv, nn.Linear)
    assert isinstance(proj, nn.Linear)
    inner = proj.in_features
    left = sorted(set(range(vars(module)["num_heads"])) - set(heads))
    if not left:
        raise RuntimeError("no head would be left")
    columns = torch.tensor([row for rows in rows_of(module, left) for row in rows])
    rows = torch.cat([columns + part * inner for part in range(3)])
    qkv.weight = nn.Parameter(qkv.weight.detach()[rows])
    if qkv.bias is not None:
        qkv.bias = nn.Parameter(qkv.bias.detach()[rows])
    proj.weight = nn.Parameter(proj.weight.detach()[:, columns])
    qkv.out_features, proj.in_features = len(rows), len(columns)
    for key, value in list(vars(module).items()):
        if type(value) is int and value == inner and not key.startswith("_"):
            setattr(module, key, len(columns))
    vars(module)["num_heads"] = len(left)
