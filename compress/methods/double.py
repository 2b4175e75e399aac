"""A model of float32 weights that computes in float64, without a float64 copy of all of them.

The weights of each module are converted when it is called and put back behind it, so only the modules that are under way
take twice their memory. A float32 number is a float64 one, too: a converted copy has the same weights.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

Zeros: TypeAlias = Mapping[int, Sequence[tuple[int, Tensor]]]
"""Axes and indices of slices, by the identity of their parameter."""
_Place: TypeAlias = tuple[nn.Module, str]
"""A module and the name of one of its own parameters."""


@contextmanager
def in_double(model: nn.Module, zeros: Zeros | None = None) -> Iterator[None]:
    """A context in which a model takes float64 inputs and computes with its own weights in float64.

    Inside, a forward pass fails where code reads a layer's weights without calling the layer, and mixes them with what was
    computed: matrix products of float64 with float32 are errors. Afterwards all tensors are those of before, also where
    a forward pass has raised.

    Args:
        model: evaluation mode; nothing is computed for gradients of its weights.
        zeros: slices that are read as zeros.
    """
    under_way = _UnderWay(zeros or {})
    with ExitStack() as stack:
        stack.callback(under_way.put_back)
        for module in model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None and buffer.is_floating_point():
                    stack.callback(module._buffers.__setitem__, name, buffer)
                    module._buffers[name] = buffer.double()
            if places := list(_read_in(module)):
                enter = functools.partial(under_way.convert, places)
                # The first of all hooks and the last: others may compute with the weights.
                stack.callback(module.register_forward_pre_hook(enter, prepend=True).remove)
                stack.callback(module.register_forward_hook(under_way.leave).remove)
        yield


def _read_in(module: nn.Module) -> Iterator[_Place]:
    """The parameters that a module's forward pass reads itself: its own, and those of children that nobody calls."""
    for name in module._parameters:
        yield module, name
    for child in module.children():
        if _is_never_called(child):
            yield from _read_in(child)


def _is_never_called(module: nn.Module) -> bool:
    """Whether a module only holds others' weights: a list of parameters, or the output projection of attention."""
    holds = type(module).forward is nn.Module.forward
    return holds or isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear)


class _UnderWay:
    """Weights that are converted now, and what they were; the innermost call last."""

    def __init__(self, zeros: Zeros) -> None:
        self._zeros = zeros
        self._calls: list[tuple[nn.Module, list[tuple[nn.Module, str, nn.Parameter]]]] = []

    def convert(self, places: Sequence[_Place], module: nn.Module, _: Any) -> None:
        """Put float64 weights in the place of those that a module reads."""
        taken: list[tuple[nn.Module, str, nn.Parameter]] = []
        self._calls.append((module, taken))
        for owner, name in places:
            parameter = owner._parameters[name]
            if parameter is None or not parameter.is_floating_point():
                continue
            zeros = self._zeros.get(id(parameter), ())
            if parameter.dtype == torch.float64 and not zeros:  # of a call around this one, or made so
                continue
            with torch.no_grad():
                double = parameter.to(torch.float64, copy=True)
                for axis, indices in zeros:
                    double.index_fill_(axis, indices, 0)
            taken.append((owner, name, parameter))
            setattr(owner, name, nn.Parameter(double, requires_grad=False))  # recurrent layers keep a list of their own

    def leave(self, module: nn.Module, *_: Any) -> None:
        """Put back what a module had, and what calls inside it had that raised."""
        while self._calls:
            called, taken = self._calls.pop()
            for owner, name, parameter in taken:
                setattr(owner, name, parameter)
            if called is module:
                return

    def put_back(self) -> None:
        """Put everything back."""
        while self._calls:
            self.leave(self._calls[-1][0])
