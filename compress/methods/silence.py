"""What removing channels must mean: the same as no layer reading them any more.

A dependency graph that is wrong (a channel shuffle, heads of attention cut across, a shortcut that pads) can still give
shapes that fit, and then a model that computes something else. So a cut is compared with a copy of the whole model in
which the weights that read the channels are zero. Both copies get random weights: in trained ones a wrong wire may hide
behind weights that are near zero, in fresh ones behind layers that begin at zero. Both compute in float64 where the model
can: then a wrong wire shows however little its channels matter beside others.

Norms over channels compute other statistics without the removed ones, which is no mistake; `NormStatistics` keeps those
of the silenced model for the cut one.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from compress.methods.groups import ChannelGroup, sharing_copy

_CLOSE = {torch.float64: 1e-6, torch.float32: 1e-3}
"""Largest error, as a fraction of what silencing the channels changes."""
_ROUNDING = {torch.float64: 1e-11, torch.float32: 1e-6}
"""Largest error, as a fraction of the outputs."""
_ENOUGH = 0.75
"""Fraction of a group's channels that must make a difference for the samples of a proof, where more samples can bring it."""
CANNOT_TELL = "a trial with random weights cannot tell:"


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Make every parameter and every BatchNorm statistic a random number of ordinary size, in place; evaluation mode.

    Matrices and filters get the standard deviation √(2 / fan-in) (He et al. 2015, arXiv:1502.01852), the weights and
    variances of norms lie between 0.5 and 1.5.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(tensor: Tensor, scale: float) -> None:
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * scale)

    def uniform(tensor: Tensor) -> None:
        tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                normal(parameter, (2 / max(1, parameter[0].numel())) ** 0.5)
            elif name.endswith("weight"):
                uniform(parameter)
            else:
                normal(parameter, 0.3)
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
                normal(module.running_mean, 0.3)
                assert module.running_var is not None
                uniform(module.running_var)
    return model.eval()


def silence(model: nn.Module, groups: Iterable[ChannelGroup], removed: Mapping[str, Sequence[int]]) -> nn.Module:
    """A copy in which all weights that read the removed channels are zero; it shares all other weights with `model`.

    Args:
        model: of the shapes that the groups were found in.
        groups: all groups that `removed` names.
        removed: channels, by group name.
    """
    read = [(item, set(removed[group.name])) for group in groups if removed.get(group.name) for item in group.coupled]
    read = [(item, gone) for item, gone in read if item.reads]
    silenced = sharing_copy(model, {item.tensor for item, _ in read})
    with torch.no_grad():
        for item, gone in read:
            zeros = [s for s, root in zip(item.slices, item.roots, strict=True) if root in gone]
            silenced.get_parameter(item.tensor).index_fill_(item.axis, torch.tensor(zeros, dtype=torch.long), 0)
    return silenced


def in_double(model: nn.Module, example: tuple[Tensor, ...]) -> tuple[nn.Module, tuple[Tensor, ...], list[Tensor]]:
    """Model and inputs in float64, or as they are where the model cannot compute in it, and its outputs.

    Args:
        model: in float32; a float64 one is a copy.
        example: a batch of each input; integers stay what they are.

    Raises:
        Exception: whatever the forward pass raises in float32 too.
    """
    precise = tuple(tensor.double() if tensor.is_floating_point() else tensor for tensor in example)
    doubled = copy.deepcopy(model).double()
    try:
        return doubled, precise, outputs_for(doubled, precise)
    except Exception:  # noqa: BLE001  # a forward that makes float32 tensors of its own may raise anything
        return model, example, outputs_for(model, example)


@dataclass(frozen=True)
class Seen:
    """Which groups a proof can tell anything of."""

    dark: tuple[str, ...]
    """Names of groups that make no difference to the outputs, so that nothing proves their wires."""
    samples: int
    """So many of the first samples are enough to tell of the others."""


def seen(model: nn.Module, groups: Iterable[ChannelGroup], example: tuple[Tensor, ...]) -> Seen:
    """Which groups make a difference to the outputs for this example, and how many of its samples that takes.

    A channel makes none where all weights that read it have the gradient zero: behind a ReLU that is never on, or inputs of
    zeros. Samples are looked at one by one, until three quarters of the channels of each group have made one.
    """
    known = list(groups)
    places = {(item.tensor, item.axis) for group in known for item in group.coupled if item.reads}
    shown: dict[str, set[int]] = {group.name: set() for group in known}
    samples = 0
    while samples < len(example[0]) and any(len(shown[group.name]) < _ENOUGH * group.channels for group in known):
        on = _on(model, places, example, samples)
        samples += 1
        for group in known:
            for item in group.coupled:
                if item.reads:
                    pairs = zip(item.slices, item.roots, strict=True)
                    shown[group.name].update(root for s, root in pairs if on[item.tensor, item.axis][s])
    return Seen(tuple(name for name, channels in shown.items() if not channels), samples)


def _on(
    model: nn.Module, places: Iterable[tuple[str, int]], example: tuple[Tensor, ...], sample: int
) -> dict[tuple[str, int], list[bool]]:
    """Whether slices of weights have a gradient other than zero, for a sample; for all where the model takes no single one."""
    axes: dict[str, list[int]] = {}
    for name, axis in places:
        axes.setdefault(name, []).append(axis)
    probe = sharing_copy(model)
    on = {(name, axis): [False] * probe.get_parameter(name).shape[axis] for name, all_ in axes.items() for axis in all_}

    alike: dict[int, list[str]] = {}
    for name in axes:
        alike.setdefault(id(probe.get_parameter(name)), []).append(name)  # a tied tensor has several names

    def look(names: Sequence[str], parameter: Tensor) -> None:
        assert parameter.grad is not None
        touched = parameter.grad != 0
        for name in names:
            for axis in axes[name]:
                on[name, axis] = touched.movedim(axis, 0).reshape(touched.shape[axis], -1).any(1).tolist()
        parameter.grad = None  # all together they are as large as the model

    # Any fixed weights of the outputs do; a plain sum would be constant behind a softmax.
    generator = torch.Generator().manual_seed(0)
    before = [(parameter, parameter.requires_grad) for parameter in probe.parameters()]
    try:
        probe.requires_grad_(False)
        with torch.enable_grad(), ExitStack() as hooks:
            for names in alike.values():
                read = probe.get_parameter(names[0]).requires_grad_(True)
                handle = read.register_post_accumulate_grad_hook(functools.partial(look, names))  # type: ignore[no-untyped-call]
                hooks.callback(handle.remove)
            try:
                answer = probe(*(tensor[sample : sample + 1] for tensor in example))
            except Exception:  # noqa: BLE001  # a user's forward may raise anything
                answer = probe(*example)
            outputs = [output for output in _tensors(answer) if output.requires_grad]
            total = sum((o * torch.randn(o.shape, generator=generator).to(o.dtype)).sum() for o in outputs)
            if isinstance(total, Tensor):
                total.backward()  # type: ignore[no-untyped-call]
    finally:
        for parameter, required in before:
            parameter.requires_grad_(required)
    return on


class Expected:
    """What a model without some channels must compute: the outputs where nothing reads them."""

    def __init__(self, silenced: nn.Module, full: Sequence[Tensor], example: tuple[Tensor, ...]) -> None:
        """Compute the outputs.

        Args:
            silenced: all shapes as they were, the removed channels unread.
            full: the outputs with all channels read: tell how much the channels matter.
            example: a batch of each input.
        """
        self._statistics, self._full, self._example = NormStatistics(), full, example
        with torch.no_grad(), self._statistics.kept():
            self._outputs = _tensors(silenced(*example))

    def missed_by(self, cut: nn.Module) -> str | None:
        """Whether a cut model computes something else; None where it does not, else what differs.

        Args:
            cut: the same weights without the channels.

        Raises:
            Exception: whatever its forward pass raises.
        """
        with torch.no_grad(), self._statistics.used():
            found = _tensors(cut(*self._example))
        shapes = [tuple(tensor.shape) for tensor in self._outputs], [tuple(tensor.shape) for tensor in found]
        if shapes[0] != shapes[1]:
            one, other = (", ".join(map(str, each)) for each in shapes)
            return f"the outputs become {other} instead of {one}"
        for want, have, before in zip(self._outputs, found, self._full, strict=True):
            if not (want.isfinite().all() and before.isfinite().all()):
                return f"{CANNOT_TELL} the outputs are not finite"
            error, effect = _largest(have - want), _largest(before - want)
            exact = want.dtype if want.dtype in _CLOSE else torch.float64
            if not error <= max(_CLOSE[exact] * effect, _ROUNDING[exact] * _largest(want)):  # also where it is NaN
                return "without them it computes something else than with them silenced"
        return None


def outputs_for(model: nn.Module, example: tuple[Tensor, ...]) -> list[Tensor]:
    """The tensors that a model answers with, without gradients."""
    with torch.no_grad():
        return _tensors(model(*example))


def what_differs(silenced: nn.Module, cut: nn.Module, whole: nn.Module, example: tuple[Tensor, ...]) -> str | None:
    """Whether a cut model computes what the silenced one does; None where it does, else what differs.

    Args:
        silenced: all shapes as they were, the removed channels unread.
        cut: the same weights without the channels.
        whole: the same weights, all channels read.
        example: a batch of each input.

    Raises:
        Exception: whatever the cut model's forward pass raises.
    """
    return Expected(silenced, outputs_for(whole, example), example).missed_by(cut)


def _tensors(answer: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(answer) if isinstance(leaf, Tensor)]


def _largest(tensor: Tensor) -> float:
    return float(tensor.double().abs().max()) if tensor.numel() else 0.0


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
