"""torch-pruning's dependency graph, with two kinds of wires that it gets wrong.

Convolutions in groups, with as many channels out as in: channels of output group k are made from those of input group k
and of no others, so both go as one, with the weights between them, and a convolution of fewer groups is left (Xie et al.
2017, "Aggregated Residual Transformations for Deep Neural Networks", arXiv:1611.05431, figure 3). A depthwise one has one
channel per group. Channels that leave within the groups would have to be the same ones in each, as one weight tensor holds
all groups.

Shortcuts that pad channels with zeros (He et al. 2015, arXiv:1512.03385, section 3.3, option A): channel j of a narrow
stream is channel `before` + j of a wide one. Which channels go decides how many zeros are left on either side, so a module
must hold the two numbers.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch_pruning.pruner.function import ConvPruner

_CHANNELS = slice(4, 6)
"""Where `F.pad` has the numbers for the channels of images: it counts axes from the last one."""


def goes_in_groups(module: nn.Module) -> bool:
    """Whether a layer is a convolution whose groups, of several channels each, can go as a whole."""
    return (
        isinstance(module, nn.modules.conv._ConvNd)
        and not module.transposed
        and module.in_channels == module.out_channels
        and 1 < module.groups < module.out_channels
    )


@dataclass(eq=False)
class ChannelPad:
    """Zeros before and behind the channels of a tensor, as a module's `attribute` says."""

    before: int
    channels: int
    after: int
    owner: nn.Module
    attribute: str

    @property
    def width(self) -> int:
        """Channels with the zeros."""
        return self.before + self.channels + self.after

    def lose(self, indices: Iterable[int]) -> None:
        """Take channels, counted with the zeros, out of the numbers and of the module that holds them."""
        gone = set(indices)
        before = sum(index < self.before for index in gone)
        after = sum(index >= self.before + self.channels for index in gone)
        self.channels -= len(gone) - before - after
        self.before, self.after = self.before - before, self.after - after
        held = getattr(self.owner, self.attribute)
        new = (self.before, self.after)
        setattr(self.owner, self.attribute, new if len(held) == 2 else (*held[:4], *new, *held[6:]))


class WiredGraph(tp.DependencyGraph):  # type: ignore[misc]
    """The dependency graph of a throwaway model."""

    def __init__(self) -> None:
        super().__init__()
        self._whole_groups = _WholeGroups()
        self._in_channel_pruning_fn.add(self._whole_groups.prune_in_channels)
        self._out_channel_pruning_fn.add(self._whole_groups.prune_out_channels)
        self._grouped: set[nn.Module] = set()
        # By the node of autograd's graph: pads whose numbers can be changed, and what to say of others.
        self._pads: dict[Any, ChannelPad] = {}
        self._fixed: dict[Any, str] = {}

    def trace(self, model: nn.Module, example: tuple[Tensor, ...]) -> WiredGraph:
        """Follow the gradients of all outputs; returns itself.

        Raises:
            Exception: whatever torch-pruning or the model's forward pass raises.
        """
        self._grouped = {module for module in model.modules() if goes_in_groups(module)}
        with warnings.catch_warnings(), torch.enable_grad(), ExitStack() as hooks:
            warnings.simplefilter("ignore")  # torch-pruning warns of bare parameters, which trials cover
            # Nobody goes back along the gradients, so activations need not be kept for it.
            nothing = torch.empty(0)
            hooks.enter_context(torch.autograd.graph.saved_tensors_hooks(lambda _: nothing, lambda _: nothing))
            for name, module in model.named_modules():
                hooks.callback(module.register_forward_hook(functools.partial(self._see, name)).remove)
            self.build_dependency(
                model,
                example_inputs=example,
                forward_fn=lambda traced, inputs: traced(*inputs),
                output_transform=lambda answer: [leaf for leaf in tree_leaves(answer) if isinstance(leaf, Tensor)],
            )
        self._wire_pads()
        return self

    def padded(self, group: Any) -> bool:
        """Whether channels of a group pass a pad whose numbers can be changed."""
        return any(dep.target.grad_fn in self._pads for dep, _ in group)

    def obstacles(self, group: Any) -> list[str]:
        """What is said of the pads in a group whose numbers nothing can change."""
        said = (self._fixed.get(dep.target.grad_fn) for dep, _ in group)
        return list(dict.fromkeys(text for text in said if text is not None))

    def widened(self, group: Any, kinds: tuple[type[nn.Module], ...]) -> Any:
        """The same group from its widest layer: beyond pads a narrow one is only a part of the stream.

        Args:
            group: of all output channels of one layer.
            kinds: of layers that can be the root of a group.
        """
        outputs = [(dep.target.module, idxs) for dep, idxs in group if self.is_out_channel_pruning_fn(dep.handler)]
        channels = {module: self.get_out_channels(module) for module, _ in outputs if isinstance(module, kinds)}
        if all(len(idxs) == channels.get(module, len(idxs)) for module, idxs in outputs):
            return group
        widest = max(channels, key=lambda module: channels[module])
        return self.of(widest, range(channels[widest]))

    def of(self, module: nn.Module, outputs: Sequence[int]) -> Any:
        """All that goes with output channels of a layer."""
        return self.get_pruning_group(module, self.get_pruner_of_module(module).prune_out_channels, list(outputs))

    def empties_a_layer(self, group: Any) -> bool:
        """Whether nothing would be left of a layer."""
        layers = [item for item in group if item.dep.target.grad_fn not in self._pads]
        return not self.check_pruning_group(layers)

    def cut(self, group: Any) -> None:
        """Take the channels of a group out of the model, and out of the numbers of pads.

        Raises:
            Exception: whatever torch-pruning raises.
        """
        pads = [(self._pads[dep.target.grad_fn], idxs) for dep, idxs in group if dep.target.grad_fn in self._pads]
        group.prune()
        for pad, indices in pads:
            pad.lose(indices)

    def get_pruner_of_module(self, module: Any) -> Any:
        """What cuts a layer; torch-pruning asks for it everywhere."""
        return self._whole_groups if module in self._grouped else super().get_pruner_of_module(module)

    def get_out_channels(self, module_or_node: Any) -> Any:
        """Output channels of a layer or an operation, None where unknown."""
        pad = self._pad_at(module_or_node)
        return super().get_out_channels(module_or_node) if pad is None else pad.width

    def get_in_channels(self, module_or_node: Any) -> Any:
        """Input channels of a layer or an operation, None where unknown."""
        pad = self._pad_at(module_or_node)
        return super().get_in_channels(module_or_node) if pad is None else pad.channels

    def _pad_at(self, module_or_node: Any) -> ChannelPad | None:
        node = module_or_node if hasattr(module_or_node, "grad_fn") else self.module2node.get(module_or_node)
        return None if node is None else self._pads.get(node.grad_fn)

    def _see(self, name: str, module: nn.Module, _: Any, output: Any) -> None:
        """Remember a module whose answer is images with padded channels. Of nested ones the innermost comes first."""
        made_by: Any = output.grad_fn if isinstance(output, Tensor) and output.dim() == 4 else None
        numbers = _numbers(made_by)
        if numbers is None or made_by in self._pads or made_by in self._fixed:
            return
        ways = (numbers, tuple(made_by._saved_pad))
        held = (key for key, value in vars(module).items() if type(value) is tuple and value in ways)
        attribute = next((key for key in held if not key.startswith("_")), None)
        if attribute is None:
            self._fixed[made_by] = _told(f"'{name}'", numbers)
        else:
            before, after = numbers
            self._pads[made_by] = ChannelPad(before, output.shape[1] - before - after, after, module, attribute)

    def _wire_pads(self) -> None:
        for node in self.module2node.values():
            pad, numbers = self._pads.get(node.grad_fn), _numbers(node.grad_fn)
            if pad is None:
                if numbers is not None:
                    self._fixed.setdefault(node.grad_fn, _told("the forward pass", numbers))
                continue
            # Of the two places for mappings torch-pruning uses the second for concatenations only.
            for source in node.inputs:
                for dep in node.dependencies:
                    if dep.target is source:
                        dep.index_mapping[1] = _Narrowed(pad)
                for dep in source.dependencies:
                    if dep.target is node:
                        dep.index_mapping[1] = _Widened(pad)


class _WholeGroups(ConvPruner):  # type: ignore[misc]
    """Cuts whole groups of a convolution, inputs and outputs at once."""

    def prune_out_channels(self, layer: nn.modules.conv._ConvNd, idxs: Sequence[int]) -> nn.Module:
        """Cut these channels, which must be whole groups, in place.

        Raises:
            RuntimeError: where they are not.
        """
        size = layer.out_channels // layer.groups
        gone = {index // size for index in idxs}
        if len(gone) * size != len(set(idxs)):
            raise RuntimeError(f"a convolution in groups of {size} channels can only lose whole groups")
        kept = [channel for channel in range(layer.out_channels) if channel // size not in gone]
        layer.weight = self._prune_parameter_and_grad(layer.weight, kept, 0)
        if layer.bias is not None:
            layer.bias = self._prune_parameter_and_grad(layer.bias, kept, 0)
        layer.in_channels = layer.out_channels = len(kept)
        layer.groups -= len(gone)
        return layer

    prune_in_channels = prune_out_channels


class _Widened:
    """From channels before a pad to those behind it, in torch-pruning's indices."""

    def __init__(self, pad: ChannelPad) -> None:
        self._pad = pad

    def __call__(self, idxs: Sequence[Any]) -> list[Any]:
        return [index._replace(idx=index.idx + self._pad.before) for index in idxs]


class _Narrowed:
    """From channels behind a pad to those before it; zeros have none."""

    def __init__(self, pad: ChannelPad) -> None:
        self._pad = pad

    def __call__(self, idxs: Sequence[Any]) -> list[Any]:
        start, channels = self._pad.before, self._pad.channels
        moved = (index._replace(idx=index.idx - start) for index in idxs)
        return [index for index in moved if 0 <= index.idx < channels]


def _numbers(made_by: Any) -> tuple[int, int] | None:
    """Zeros before and behind the channels of images that a node of autograd's graph adds; None where it adds none."""
    if not type(made_by).__name__.startswith("ConstantPadNd"):
        return None
    before, after = (*made_by._saved_pad[_CHANNELS], 0, 0)[:2]
    return (before, after) if min(before, after) >= 0 and max(before, after) > 0 else None


def _told(who: str, numbers: tuple[int, int]) -> str:
    before, after = numbers
    return (
        f"{who} pads the channels by {before} and {after}, and nothing can change that; a module that only pads and has both "
        "numbers in a tuple, as compress.models.cifar.ZeroPadShortcut, can be pruned"
    )
