"""Groups of channels that can only be removed together, found by torch-pruning's dependency graph.

Source: Fang et al. 2023, "DepGraph: Towards Any Structural Pruning", arXiv:2301.12900. torch-pruning cuts modules in
place, so it only ever sees throwaway copies here. What it finds is a proposal: `methods.silence` tells whether removing
a group means what it should. `methods.wires` adds what torch-pruning does not know.

A channel of a group may stand for several outputs of a layer: a whole group of a convolution in groups. And a stream that
shortcuts widen by padding is several groups, one for each set of layers that its channels go through, so that every layer keeps
its share: a ResNet of 16, 32 and 64 channels has 16 that go through all three stages, 16 through two and 32 through the last.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compress.errors import ModelError, first_line
from compress.methods import attention
from compress.methods.importance import l1_norm, sum_by_root
from compress.methods.wires import WiredGraph, goes_in_groups

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
    root: str = ""
    """The layer whose outputs `members` counts."""
    members: tuple[tuple[int, ...], ...] = ()
    """The outputs of `root` that each channel stands for: `((0,), (1,), …)`, or whole groups of a convolution. Where queries,
    keys and values come from one layer, its outputs count by heads."""
    obstacle: str = ""
    """What the channels pass that nothing can cut, as far as the graph can tell."""

    @property
    def is_read(self) -> bool:
        """Whether weights are known that read the channels."""
        return any(item.reads for item in self.coupled)


def outputs_of(groups: Iterable[ChannelGroup], removed: Mapping[str, Sequence[int]]) -> dict[str, list[int]]:
    """Channels of groups, by group name, as outputs of the layers that the groups are counted in."""
    gone: dict[str, set[int]] = {}
    for group in groups:
        for channel in removed.get(group.name, ()):
            gone.setdefault(group.root, set()).update(group.members[channel])
    return {layer: sorted(outputs) for layer, outputs in gone.items()}


@dataclass(frozen=True)
class _Item:
    """A layer or a bare parameter that channels go through."""

    name: str
    roots: tuple[int, ...]
    """The outputs of the root that its slices follow."""
    coupled: tuple[Coupled, ...]
    is_layer: bool = False
    produces: bool = False
    """Whether the channels are its outputs."""
    heads: int = 1
    together: tuple[int, ...] = ()
    """For each slice, what leaves as one: the group of a convolution. Empty: each slice may leave alone."""


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
        self.model = model.eval()
        """The throwaway."""
        self._names = {module: name for name, module in model.named_modules()}
        self._parameters = {parameter: name for name, parameter in model.named_parameters()}
        for parameter in model.parameters():
            parameter.requires_grad_(True)  # the trace follows gradients
        self._fused = attention.fused(self.model)
        self._graph = WiredGraph().trace(self.model, example)

    def groups(self) -> Iterator[ChannelGroup]:
        """All groups, in the order torch-pruning finds them: from the outputs back."""
        roots: set[nn.Module] = set()
        for found in self._graph.get_all_groups(root_module_types=_ROOTS):
            group = self._graph.widened(found, _ROOTS) if self._graph.padded(found) else found
            root = group[0].dep.target.module
            if root not in self._names or root in roots:
                continue
            roots.add(root)
            if (name := self._names[root]) in self._fused:
                yield _heads(name, self._fused[name])
            else:
                yield from self._described(group)

    def remove(self, removed: Mapping[str, Sequence[int]]) -> nn.Module:
        """Cut outputs of layers, by the layer's name, out of the model with all that goes with them; returns it.

        Of layers that make queries, keys and values at once, the outputs are heads.

        Raises:
            Exception: whatever torch-pruning raises where a layer cannot be cut.
        """
        by_name = {name: module for module, name in self._names.items()}
        for name, outputs in removed.items():
            if name in self._fused:
                continue
            group = self._graph.of(by_name[name], outputs)
            if self._graph.empties_a_layer(group):
                raise RuntimeError(f"nothing would be left of a layer in the group of '{name}'")
            self._graph.cut(group)
        for name in removed.keys() & self._fused.keys():  # last, as torch-pruning reads shapes while it cuts
            attention.remove_heads(self._fused[name], removed[name])
        return self.model

    def _described(self, group: Any) -> Iterator[ChannelGroup]:
        root = self._names[group[0].dep.target.module]
        items = [item for found in group if (item := self._item(found)) is not None]
        members = _tied(len(group[0].idxs), items)
        sections = self._sections(root, members, items) if self._graph.padded(group) else {root: members}
        obstacle = "; ".join(self._graph.obstacles(group))
        for name, some in sections.items():
            yield _group(name, root, some, items, obstacle)

    def _item(self, found: Any) -> _Item | None:
        module, slices, roots = found.dep.target.module, tuple(found.idxs), tuple(found.root_idxs)
        if isinstance(module, nn.Parameter):
            if (bare := self._parameters.get(module)) is None:
                return None
            return _Item(bare, roots, (Coupled(bare, _last_long_axis(module), slices, roots),))
        name = self._names.get(module)
        known = isinstance(module, (*_ROOTS, nn.MultiheadAttention))
        if name is None or not (known or any(True for _ in module.parameters(recurse=False))):
            return None
        outputs = self._graph.is_out_channel_pruning_fn(found.dep.handler)
        attention = isinstance(module, nn.MultiheadAttention)
        prefix = f"{name}." if name else ""
        touched = _touched(module, slices, roots, outputs)
        size = module.out_channels // module.groups if goes_in_groups(module) else 1
        return _Item(
            name,
            roots,
            tuple(dataclasses.replace(part, tensor=prefix + part.tensor) for part in touched),
            is_layer=True,
            produces=attention or (outputs and isinstance(module, _ROOTS)),
            heads=module.num_heads if attention else 1,
            together=tuple(index // size for index in slices) if size > 1 else (),
        )

    def _sections(
        self, root: str, members: Sequence[tuple[int, ...]], items: Sequence[_Item]
    ) -> dict[str, list[tuple[int, ...]]]:
        """The members that the same layers make, each named after the narrowest layer that no other is named after."""
        makers = [(item.name, frozenset(item.roots)) for item in items if item.produces]
        made_by: dict[frozenset[str], list[tuple[int, ...]]] = {}
        for outputs in members:
            made_by.setdefault(frozenset(name for name, made in makers if not made.isdisjoint(outputs)), []).append(
                outputs
            )
        width = {name: len(made) for name, made in makers}
        order = {name: place for place, name in enumerate(self._names.values())}
        sections: dict[str, list[tuple[int, ...]]] = {}
        for names, some in made_by.items():
            free = [name for name in names if name not in sections]
            numbered = f"{root}[{some[0][0]}]"
            sections[min(free, key=lambda name: (width[name], order[name]), default=numbered)] = some
        return sections


def _tied(width: int, items: Iterable[_Item]) -> list[tuple[int, ...]]:
    """The outputs 0 to `width` - 1 of the root in sets that can only leave together, ordered by their first ones."""
    leader = list(range(width))

    def of(output: int) -> int:
        while leader[output] != output:
            output = leader[output]
        return output

    for item in items:
        first: dict[int, int] = {}
        for bundle, root in zip(item.together, item.roots, strict=False):
            one, other = sorted((of(root), of(first.setdefault(bundle, root))))
            leader[other] = one
    sets: dict[int, list[int]] = {}
    for output in range(width):
        sets.setdefault(of(output), []).append(output)
    return [tuple(outputs) for outputs in sets.values()]


def _group(
    name: str, root: str, members: Sequence[tuple[int, ...]], items: Iterable[_Item], obstacle: str
) -> ChannelGroup:
    """The group whose channels are `members`, and what of `items` goes with them."""
    channel = {output: place for place, outputs in enumerate(members) for output in outputs}
    touched = [item for item in items if any(output in channel for output in item.roots)]
    coupled = []
    for item in touched:
        for part in item.coupled:
            pairs = [(s, channel[r]) for s, r in zip(part.slices, part.roots, strict=True) if r in channel]
            slices, roots = zip(*pairs, strict=True)
            coupled.append(dataclasses.replace(part, slices=slices, roots=roots))
    heads = math.lcm(*(item.heads for item in touched))
    return ChannelGroup(
        name=name,
        channels=len(members),
        layers=tuple(dict.fromkeys(item.name for item in touched if item.is_layer)),
        producers=tuple(dict.fromkeys(item.name for item in touched if item.produces)),
        coupled=tuple(coupled),
        blocks=1 if len(members) % heads else heads,
        root=root,
        members=tuple(members),
        obstacle=obstacle,
    )


def _heads(name: str, module: nn.Module) -> ChannelGroup:
    """The heads of attention whose queries, keys and values come from the layer `name`; torch-pruning sees one wide layer."""
    path = name.removesuffix("qkv")
    heads = range(vars(module)["num_heads"])
    columns = attention.rows_of(module, heads)
    slices = tuple(row for rows in columns for row in rows)
    roots = tuple(head for head, rows in zip(heads, columns, strict=True) for _ in rows)
    made = tuple(row + part * len(slices) for part in range(3) for row in slices)
    coupled = [Coupled(f"{name}.weight", 0, made, roots * 3, scored=True)]
    if module.get_submodule("qkv").bias is not None:
        coupled.append(Coupled(f"{name}.bias", 0, made, roots * 3))
    coupled.append(Coupled(f"{path}proj.weight", 1, slices, roots, scored=True, reads=True))
    return ChannelGroup(
        name=name,
        channels=len(heads),
        layers=(name, f"{path}proj"),
        producers=(name,),
        coupled=tuple(coupled),
        root=name,
        members=tuple((head,) for head in heads),
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
        through = depthwise or goes_in_groups(module)  # what goes in is what comes out
        transposed = isinstance(module, nn.modules.conv._ConvTransposeNd)
        axis = 0 if through else int(outputs == transposed)
        if axis < module.weight.dim() and max(slices) < module.weight.shape[axis]:
            yield Coupled("weight", axis, slices, roots, scored=True, reads=not outputs and not through)
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
    return _copied(model, {}).cpu().float().eval()


def sharing_copy(model: nn.Module, own: Iterable[str] = ()) -> nn.Module:
    """A copy whose parameters are the very ones of `model`, for surgery, which puts new ones in their place.

    Args:
        model: its buffers are copied.
        own: names of parameters that are copied too; those that are one tensor stay one.

    Raises:
        ModelError: where the model cannot be copied.
    """
    copied = {id(model.get_parameter(name)) for name in own}
    return _copied(model, {id(one): one for one in model.parameters() if id(one) not in copied})


def copy_with(model: nn.Module, make: Callable[[nn.Parameter], Tensor]) -> nn.Module:
    """A copy with other parameters; those that are one tensor stay one.

    Args:
        model: its buffers are copied.
        make: the values in place of a parameter's; they may lie in the same memory.

    Raises:
        ModelError: where the model cannot be copied.
    """
    made = {id(one): nn.Parameter(make(one), one.requires_grad) for one in model.parameters()}
    return _copied(model, made)


def aliasing_copy(model: nn.Module) -> nn.Module:
    """A copy with parameters of its own in the memory of those of `model`: to trace, and to cut by putting new ones in."""
    return copy_with(model, lambda parameter: parameter.detach())


def _copied(model: nn.Module, shared: dict[int, Any]) -> nn.Module:
    try:
        return copy.deepcopy(model, shared)
    except RuntimeError as error:
        raise ModelError(
            f"the model cannot be copied: {first_line(error)}; remove such hooks (weight_norm?) first"
        ) from error
