"""Groups of channels that can only be removed together, found by torch-pruning's dependency graph.

Source: Fang et al. 2023, "DepGraph: Towards Any Structural Pruning", arXiv:2301.12900. torch-pruning cuts modules in
place, so it only ever sees throwaway copies here. What it finds is a proposal: `methods.silence` tells whether removing
a group means what it should.
"""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from compress.errors import ModelError, first_line
from compress.methods.importance import l1_norm, sum_by_root

_ROOTS = (nn.modules.conv._ConvNd, nn.Linear, nn.Embedding)


@dataclass(frozen=True)
class Coupled:
    """A parameter that a group touches: slices of `axis`, each following one of the group's channels."""

    tensor: str
    axis: int
    slices: tuple[int, ...]
    roots: tuple[int, ...]
    scored: bool = False
    """Whether these weights say how much a channel matters: those that make it and those that read it."""
    reads: bool = False
    """Whether zeros in these slices silence the channels: the weights that multiply them."""


@dataclass(frozen=True)
class ChannelGroup:
    """Channels that go together, named after a layer that produces them."""

    name: str
    channels: int
    layers: tuple[str, ...]
    """Every layer with parameters that loses something with them."""
    producers: tuple[str, ...]
    """The layers whose outputs they are."""
    coupled: tuple[Coupled, ...]
    """Parameters that lose slices with them, as far as this module knows the layer's kind."""
    blocks: int = 1
    """Equal blocks that must lose equally many channels: the heads of attention."""

    @property
    def is_read(self) -> bool:
        """Whether weights are known that read the channels."""
        return any(item.reads for item in self.coupled)


class ChannelGraph:
    """The dependency graph of a throwaway model, which it may cut."""

    def __init__(self, model: nn.Module, example: tuple[Tensor, ...]) -> None:
        """Trace `model`, which must not be used for anything else afterwards.

        Args:
            model: takes `example`, positionally.
            example: a batch of each input.

        Raises:
            RuntimeError: where the model cannot be traced.
        """
        self._model = model.eval()
        self._names = {module: name for name, module in model.named_modules()}
        self._parameters = {parameter: name for name, parameter in model.named_parameters()}
        for parameter in model.parameters():
            parameter.requires_grad_(True)  # the trace follows gradients
        with warnings.catch_warnings(), torch.enable_grad():
            warnings.simplefilter("ignore")  # torch-pruning warns of bare parameters, which trials cover
            self._graph = tp.DependencyGraph().build_dependency(
                self._model,
                example_inputs=example,
                forward_fn=lambda traced, inputs: traced(*inputs),
                output_transform=lambda answer: [leaf for leaf in tree_leaves(answer) if isinstance(leaf, Tensor)],
            )

    def groups(self) -> Iterator[ChannelGroup]:
        """All groups, in the order torch-pruning finds them: from the outputs back."""
        for group in self._graph.get_all_groups(root_module_types=_ROOTS):
            found = self._describe(group)
            if found is not None:
                yield found

    def remove(self, removed: Mapping[str, Sequence[int]]) -> nn.Module:
        """Cut channels, by group name, out of the model; returns it.

        Raises:
            Exception: whatever torch-pruning raises where a layer cannot be cut.
        """
        by_name = {name: module for module, name in self._names.items()}
        for name, indices in removed.items():
            module = by_name[name]
            cutter = self._graph.get_pruner_of_module(module).prune_out_channels
            group = self._graph.get_pruning_group(module, cutter, list(indices))
            if not self._graph.check_pruning_group(group):
                raise RuntimeError(f"nothing would be left of a layer in the group of '{name}'")
            group.prune()
        return self._model

    def _describe(self, group: Any) -> ChannelGroup | None:
        root = group[0].dep.target.module
        if root not in self._names:
            return None
        layers: list[str] = []
        producers: list[str] = []
        coupled: list[Coupled] = []
        blocks = 1
        for found in group:
            module, slices, roots = found.dep.target.module, tuple(found.idxs), tuple(found.root_idxs)
            if isinstance(module, nn.Parameter):
                if module in self._parameters:
                    coupled.append(Coupled(self._parameters[module], _last_long_axis(module), slices, roots))
                continue
            name = self._names.get(module)
            known = isinstance(module, (*_ROOTS, nn.MultiheadAttention))
            if name is None or not (known or any(True for _ in module.parameters(recurse=False))):
                continue
            layers.append(name)
            outputs = self._graph.is_out_channel_pruning_fn(found.dep.handler)
            if outputs and isinstance(module, _ROOTS):
                producers.append(name)
            if isinstance(module, nn.MultiheadAttention):
                producers.append(name)
                blocks = module.num_heads
            prefix = f"{name}." if name else ""
            touched = _touched(module, slices, roots, outputs)
            coupled += [dataclasses.replace(item, tensor=prefix + item.tensor) for item in touched]
        return ChannelGroup(
            name=self._names[root],
            channels=len(group[0].idxs),
            layers=tuple(dict.fromkeys(layers)),
            producers=tuple(dict.fromkeys(producers)),
            coupled=tuple(coupled),
            blocks=blocks,
        )


def _last_long_axis(tensor: Tensor) -> int:
    """The axis along which torch-pruning cuts bare parameters."""
    return max((axis for axis, size in enumerate(tensor.shape) if size > 1), default=0)


def _touched(module: nn.Module, slices: tuple[int, ...], roots: tuple[int, ...], outputs: bool) -> Iterator[Coupled]:
    """The parameters of a layer that lose slices, where the group touches its outputs or its inputs."""
    if isinstance(module, nn.MultiheadAttention):
        yield from _touched_in_attention(module, slices, roots)
        return
    if isinstance(module, (nn.modules.conv._ConvNd, nn.Linear)):
        depthwise = isinstance(module, nn.modules.conv._ConvNd) and module.groups == module.out_channels > 1
        transposed = isinstance(module, nn.modules.conv._ConvTransposeNd)
        axis = 0 if depthwise else int(outputs == transposed)
        if axis < module.weight.dim() and max(slices) < module.weight.shape[axis]:
            yield Coupled("weight", axis, slices, roots, scored=True, reads=not outputs and not depthwise)
        if outputs and module.bias is not None:
            yield Coupled("bias", 0, slices, roots)
        return
    if isinstance(module, nn.Embedding):
        yield Coupled("weight", 1, slices, roots, scored=True)
        return
    for name, parameter in module.named_parameters(recurse=False):
        if parameter.dim() == 1 and max(slices) < len(parameter):  # norms and PReLU
            yield Coupled(name, 0, slices, roots)


def _touched_in_attention(
    module: nn.MultiheadAttention, slices: tuple[int, ...], roots: tuple[int, ...]
) -> Iterator[Coupled]:
    """Attention has one width inside and outside: the same channels go from both, of queries, keys and values alike."""
    if module.in_proj_weight is None:  # keys and values of another width than the queries
        return
    for part in range(3):
        rows = tuple(part * module.embed_dim + index for index in slices)
        # A query channel that is zero takes its key channel out of the product as well.
        is_query = part == 0
        yield Coupled("in_proj_weight", 0, rows, roots, scored=True, reads=is_query)
        if module.in_proj_bias is not None:
            yield Coupled("in_proj_bias", 0, rows, roots, reads=is_query)
    yield Coupled("in_proj_weight", 1, slices, roots, scored=True, reads=True)
    yield Coupled("out_proj.weight", 0, slices, roots, scored=True)
    yield Coupled("out_proj.weight", 1, slices, roots, scored=True, reads=True)
    if module.out_proj.bias is not None:
        yield Coupled("out_proj.bias", 0, slices, roots)


def l1_scores(model: nn.Module, group: ChannelGroup) -> Tensor:
    """L1 norm of each channel of a group, summed over the coupled weights; float64, shape (channels,)."""
    scores, roots = [], []
    for item in group.coupled:
        if item.scored:
            weight = model.get_parameter(item.tensor).detach().cpu()
            scores.append(l1_norm(weight, item.axis)[torch.tensor(item.slices)])
            roots.append(torch.tensor(item.roots))
    return sum_by_root(scores, roots, group.channels)


def copy_on_cpu(model: nn.Module) -> nn.Module:
    """An independent float32 copy on the CPU, for tracing and cutting.

    Raises:
        ModelError: where the model cannot be copied, as with parametrizations of the old kind.
    """
    try:
        return copy.deepcopy(model).cpu().float().eval()
    except RuntimeError as error:
        raise ModelError(
            f"the model cannot be copied: {first_line(error)}; remove such hooks (weight_norm?) first"
        ) from error
