"""What removing channels must mean: the same as no layer reading them any more.

A dependency graph that is wrong (a channel shuffle, heads of attention cut across, a shortcut that pads) can still give
shapes that fit, and then a model that computes something else. So a cut is compared with a copy of the whole model in
which the weights that read the channels are zero. Both copies get random weights: in trained ones a wrong wire may hide
behind weights that are near zero, in fresh ones behind layers that begin at zero. Both compute in float64 where the model
can: then a wrong wire shows however little its channels matter beside others. The random weights lie in memory once, in
float32; `double.in_double` reads them in float64, and reads zeros where channels are silenced.

Norms over channels compute other statistics without the removed ones, which is no mistake; `norms.NormStatistics` keeps
those of the silenced model for the cut one.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from compress.methods.double import in_double
from compress.methods.groups import ChannelGroup, copy_with, sharing_copy
from compress.methods.norms import NormStatistics

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
        tensor.copy_(torch.randn(tensor.shape, generator=generator).mul_(scale))

    def uniform(tensor: Tensor) -> None:
        tensor.copy_(torch.rand(tensor.shape, generator=generator).add_(0.5))

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


def random_copy(model: nn.Module) -> nn.Module:
    """A copy that `randomise` has made random; the weights of `model` are not copied first."""
    return randomise(copy_with(model, lambda parameter: torch.empty_like(parameter, requires_grad=False)))


def silence(model: nn.Module, groups: Iterable[ChannelGroup], removed: Mapping[str, Sequence[int]]) -> nn.Module:
    """A copy in which all weights that read the removed channels are zero; it shares all other weights with `model`.

    Args:
        model: of the shapes that the groups were found in.
        groups: all groups that `removed` names.
        removed: channels, by group name.
    """
    places = _silenced(groups, removed)
    silenced = sharing_copy(model, {tensor for tensor, _, _ in places})
    with torch.no_grad():
        for tensor, axis, zeros in places:
            silenced.get_parameter(tensor).index_fill_(axis, zeros, 0)
    return silenced


def _silenced(groups: Iterable[ChannelGroup], removed: Mapping[str, Sequence[int]]) -> list[tuple[str, int, Tensor]]:
    """The weights that read the removed channels: tensor, axis, indices."""
    found = []
    for group in groups:
        gone = set(removed.get(group.name, ()))
        for item in group.coupled:
            if gone and item.reads:
                zeros = [s for s, root in zip(item.slices, item.roots, strict=True) if root in gone]
                found.append((item.tensor, item.axis, torch.tensor(zeros, dtype=torch.long)))
    return found


class Whole:
    """A model with all channels read, and what it computes for a few samples: what proofs compare with.

    It computes in float64: weight by weight where its forward pass calls its layers, else in a float64 copy. A model that
    makes float32 tensors of its own computes in float32.
    """

    def __init__(self, model: nn.Module, samples: tuple[Tensor, ...]) -> None:
        """Compute the outputs.

        Args:
            model: in float32; its weights stay as they are, and what its forward pass keeps in it.
            samples: a batch of each input; integers stay what they are.

        Raises:
            Exception: whatever the forward pass raises in float32 too.
        """
        # Another module, as a forward pass may keep a table in the type of its inputs.
        self.model, self._samples, self._by_weight = sharing_copy(model), in_float64(samples), True
        try:
            with in_double(self.model):
                self._outputs = outputs_for(self.model, self._samples)
            return
        except Exception:  # noqa: BLE001  # a user's forward may raise anything
            self._by_weight = False
        try:
            self.model = copy.deepcopy(model).double()
            self._outputs = outputs_for(self.model, self._samples)
        except Exception:  # noqa: BLE001  # as above
            self.model, self._samples = model, samples
            self._outputs = outputs_for(model, samples)

    @property
    def dtype(self) -> torch.dtype | None:
        """What weights that are made anew for a proof must be of; None where it is theirs already."""
        return torch.float64 if self._by_weight else None

    def silenced(self, groups: Sequence[ChannelGroup], removed: Mapping[str, Sequence[int]]) -> Expected:
        """What the model must compute without these channels.

        Args:
            groups: all groups that `removed` names.
            removed: channels, by group name.

        Raises:
            Exception: whatever its forward pass raises.
        """
        if not self._by_weight:
            return Expected(silence(self.model, groups, removed), self._outputs, self._samples)
        zeros: dict[int, list[tuple[int, Tensor]]] = {}
        for tensor, axis, indices in _silenced(groups, removed):
            zeros.setdefault(id(self.model.get_parameter(tensor)), []).append((axis, indices))
        with in_double(self.model, zeros):
            return Expected(self.model, self._outputs, self._samples)

    def missed_by(self, cut: nn.Module, expected: Expected) -> str | None:
        """Whether a model that was cut out of this one computes something else than expected, see `Expected.missed_by`.

        Raises:
            Exception: whatever its forward pass raises.
        """
        context: AbstractContextManager[None] = in_double(cut) if self._by_weight else nullcontext()
        with context:
            return expected.missed_by(cut)


def in_float64(samples: Iterable[Tensor]) -> tuple[Tensor, ...]:
    """The samples in float64; integers stay what they are."""
    return tuple(tensor.double() if tensor.is_floating_point() else tensor for tensor in samples)


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
    own = {parameter.untyped_storage().data_ptr() for parameter in probe.parameters()}
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

    def pack(saved: Tensor) -> tuple[Tensor, torch.dtype]:
        """What is kept of a tensor for the way back: of float32 whether it is zero, at little more than that takes.

        bfloat16 goes as near to zero as float32 does, but not as near to one: behind a gate that is almost open it can show a
        gradient of zero where there is one. Float64 stays whole and tells.
        """
        kept = saved.dtype == torch.float32 and saved.untyped_storage().data_ptr() not in own
        return saved.to(torch.bfloat16) if kept else saved, saved.dtype

    def unpack(packed: tuple[Tensor, torch.dtype]) -> Tensor:
        return packed[0].to(packed[1])

    # Any fixed weights of the outputs do; a plain sum would be constant behind a softmax.
    generator = torch.Generator().manual_seed(0)
    before = [(parameter, parameter.requires_grad) for parameter in probe.parameters()]
    try:
        probe.requires_grad_(False)
        with torch.enable_grad(), ExitStack() as hooks:
            hooks.enter_context(torch.autograd.graph.saved_tensors_hooks(pack, unpack))
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
