"""Groups of channels that can only be removed together, found by torch-pruning's dependency graph.

Source: Fang et al. 2023, "DepGraph: Towards Any Structural Pruning", arXiv:2301.12900. torch-pruning cuts modules in
place, so it only ever sees throwaway copies here.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn

from compress.errors import ModelError
from compress.methods.importance import l1_norm, sum_by_root


@dataclass(frozen=True)
class Coupled:
    """A tensor that a group touches: slices of `axis`, each following one of the group's channels."""

    layer: str
    axis: int
    slices: tuple[int, ...]
    roots: tuple[int, ...]


@dataclass(frozen=True)
class ChannelGroup:
    """Channels that go together, named after the layer that produces them."""

    name: str
    channels: int
    layers: tuple[str, ...]
    """Every layer with parameters that loses something with them."""
    producers: tuple[str, ...]
    """The layers whose outputs they are."""
    coupled: tuple[Coupled, ...]
    """Weights to score them by: those of convolutions and linear layers."""


class ChannelGraph:
    """The dependency graph of a throwaway model, which it may cut."""

    def __init__(self, model: nn.Module, example: Tensor) -> None:
        """Trace `model`, which must not be used for anything else afterwards.

        Raises:
            RuntimeError: where the model cannot be traced.
        """
        self._model = model.eval()
        self._names = {module: name for name, module in model.named_modules()}
        for parameter in model.parameters():
            parameter.requires_grad_(True)  # the trace follows gradients
        with warnings.catch_warnings(), torch.enable_grad():
            warnings.simplefilter("ignore")  # torch-pruning warns of bare parameters, which `find` handles itself
            self._graph = tp.DependencyGraph().build_dependency(self._model, example_inputs=example)

    def groups(self) -> Iterator[ChannelGroup]:
        """All groups, in the order torch-pruning finds them: from the outputs back."""
        for group in self._graph.get_all_groups():
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
        for item in group:
            module, cutter = item.dep.target.module, item.dep.handler
            name = self._names.get(module)
            if name is None or not any(True for _ in module.parameters(recurse=False)):
                continue
            layers.append(name)
            outputs = self._graph.is_out_channel_pruning_fn(cutter)
            if isinstance(module, (nn.modules.conv._ConvNd, nn.Linear)):
                if outputs:
                    producers.append(name)
                transposed = isinstance(module, nn.modules.conv._ConvTransposeNd)
                axis = int(outputs == transposed)
                if axis < module.weight.dim() and max(item.idxs) < module.weight.shape[axis]:
                    coupled.append(Coupled(name, axis, tuple(item.idxs), tuple(item.root_idxs)))
        return ChannelGroup(
            name=self._names[root],
            channels=len(group[0].idxs),
            layers=tuple(dict.fromkeys(layers)),
            producers=tuple(dict.fromkeys(producers)),
            coupled=tuple(coupled),
        )


def l1_scores(model: nn.Module, group: ChannelGroup) -> Tensor:
    """L1 norm of each channel of a group, summed over the coupled weights; float64, shape (channels,)."""
    scores, roots = [], []
    for item in group.coupled:
        weight = model.get_submodule(item.layer).get_parameter("weight").detach().cpu()
        scores.append(l1_norm(weight, item.axis)[torch.tensor(item.slices)])
        roots.append(torch.tensor(item.roots))
    return sum_by_root(scores, roots, group.channels)


def why_unprunable(make: Callable[[], nn.Module], example: Tensor, removed: Mapping[str, Sequence[int]]) -> str | None:
    """Try on a copy what removing channels does; None where the model still works.

    Args:
        make: gives a fresh copy of the model.
        example: a batch of inputs.
        removed: channels to remove, by group name.

    Returns:
        The reason why not: the first line of the error, or what became of the outputs.
    """
    model = make()
    with torch.no_grad():
        before = model(example)
    try:
        cut = ChannelGraph(model, example).remove(removed)
        with torch.no_grad():
            after = cut(example)
    except Exception as error:  # noqa: BLE001  # torch-pruning and forward passes may raise anything; each is the answer
        return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if isinstance(before, Tensor) and isinstance(after, Tensor) and before.shape != after.shape:
        return f"the outputs become {tuple(after.shape)} instead of {tuple(before.shape)}"
    return None


def copy_on_cpu(model: nn.Module) -> nn.Module:
    """An independent float32 copy on the CPU, for tracing and cutting.

    Raises:
        ModelError: where the model cannot be copied, as with parametrizations of the old kind.
    """
    try:
        return copy.deepcopy(model).cpu().float().eval()
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ModelError(f"the model cannot be copied: {reason}; remove such hooks (weight_norm?) first") from error
