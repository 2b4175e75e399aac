"""Layer and group norms with the statistics of another forward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


class NormStatistics:
    """Means and variances of layer and group norms: kept in one forward pass, used in the order of calls in another."""

    def __init__(self) -> None:
        self._calls: list[tuple[Tensor, Tensor]] = []

    def kept(self) -> TorchFunctionMode:
        """A context whose norms compute as ever, and are remembered."""
        self._calls.clear()
        return _Norms(self._keep)

    def used(self) -> TorchFunctionMode:
        """A context whose norms take the remembered statistics, first call first."""
        calls = iter(self._calls)
        return _Norms(lambda mean, variance: next(calls, (mean, variance)))

    def _keep(self, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
        self._calls.append((mean, variance))
        return mean, variance


class _Norms(TorchFunctionMode):
    """Computes layer and group norms by hand, with statistics of somebody's choice."""

    def __init__(self, choose: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self._choose = choose

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.layer_norm:
            return self._layer_norm(*args, **kwargs)
        if func is F.group_norm:
            return self._group_norm(*args, **kwargs)
        return func(*args, **kwargs)

    def _layer_norm(
        self,
        x: Tensor,
        normalized_shape: Sequence[int],
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-5,
    ) -> Tensor:
        axes = tuple(range(-len(normalized_shape), 0))
        mean, variance = self._choose(x.mean(axes, keepdim=True), x.var(axes, correction=0, keepdim=True))
        y = (x - mean) * (variance + eps).rsqrt()
        y = y if weight is None else y * weight
        return y if bias is None else y + bias

    def _group_norm(
        self, x: Tensor, groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
    ) -> Tensor:
        parts = x.reshape(x.shape[0], groups, -1)
        mean, variance = self._choose(parts.mean(-1, keepdim=True), parts.var(-1, correction=0, keepdim=True))
        y = ((parts - mean) * (variance + eps).rsqrt()).reshape(x.shape)
        shape = (-1, *(1,) * (x.dim() - 2))
        y = y if weight is None else y * weight.reshape(shape)
        return y if bias is None else y + bias.reshape(shape)
