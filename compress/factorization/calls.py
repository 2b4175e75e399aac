"""Where layers are applied: shapes and positions of what they are given, which decide what each form of them costs."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from compress.data.base import Inputs
from compress.models.modes import in_evaluation


@dataclass(frozen=True)
class Call:
    """Where one layer is applied, for one sample; of several calls the positions add up."""

    shape: tuple[int, ...]
    """Of the largest input of the layer, the batch that it sees first, for one sample of the model."""
    into: int
    """Input positions: height times width; 1 for a linear layer on a vector."""
    middle: int
    """Output height times input width: where a vertical convolution is applied."""
    out: int
    """Output positions."""


@torch.no_grad()
def calls_of(model: nn.Module, layers: Sequence[str], example: Inputs) -> dict[str, Call]:
    """Where these layers are applied when the model gets one sample.

    Args:
        model: on the CPU; its mode stays.
        layers: names of linear layers and two-dimensional convolutions.
        example: a batch of any size, of which the first sample is taken.

    Returns:
        By name; a layer that is never called has none.
    """
    found: dict[str, Call] = {}

    def remember(
        name: str, module: nn.Module, given: tuple[Tensor, ...], named: dict[str, Tensor], output: Tensor
    ) -> None:
        one = _call(module, first_input(given, named), output)
        before = found.get(name, Call((), 0, 0, 0))
        shape = max(before.shape, one.shape, key=math.prod) if before.shape else one.shape
        found[name] = Call(shape, before.into + one.into, before.middle + one.middle, before.out + one.out)

    with ExitStack() as hooks, in_evaluation(model):
        for name in layers:
            hook = functools.partial(remember, name)
            hooks.callback(model.get_submodule(name).register_forward_hook(hook, with_kwargs=True).remove)
        model(*(tensor[:1] for tensor in example))
    return found


def first_input(given: Sequence[Tensor], named: Mapping[str, Tensor]) -> Tensor:
    """What a hook's layer was called with, by position or by name; linear layers and convolutions take one tensor."""
    return given[0] if given else next(iter(named.values()))


def _call(module: nn.Module, given: Tensor, output: Tensor) -> Call:
    into = _positions(tuple(given.shape), module)
    if not isinstance(module, nn.Conv2d):
        return Call(tuple(given.shape), into, into, into)
    out = output.numel() // module.out_channels
    return Call(tuple(given.shape), into, out // output.shape[-1] * given.shape[-1], out)


def _positions(shape: tuple[int, ...], module: nn.Module) -> int:
    channels = shape[-3] if isinstance(module, nn.Conv2d) else shape[-1]
    return math.prod(shape) // channels
