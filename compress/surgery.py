"""The only code that changes a module tree: replays edits, and derives them from what a pruner did to a copy."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor, nn

from compress.edits import Attribute, Edit, Factor, Keep
from compress.errors import CheckpointError

_INTEGER_OF = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def apply(model: nn.Module, edit: Edit) -> None:
    """Change `model` in place as the edit says; works on meta tensors as well.

    `Factor` makes the two layers with uninitialised weights: their values come from the checkpoint, or from the stage.

    Raises:
        CheckpointError: where the edit does not fit the model, naming the tensor or module.
    """
    match edit:
        case Keep():
            _keep(model, edit)
        case Attribute():
            _set_attribute(model, edit)
        case Factor():
            _factor(model, edit)


def apply_all(model: nn.Module, edits: Iterable[Edit]) -> nn.Module:
    """Apply edits in order; returns the same model."""
    for edit in edits:
        apply(model, edit)
    return model


def tied_to(model: nn.Module, name: str) -> str | None:
    """Another name of the parameter `name`, where it has one."""
    tensor = model.get_parameter(name)
    return next((other for other, shared in _tensors(model) if shared is tensor and other != name), None)


def unties(model: nn.Module, edits: Iterable[Edit]) -> tuple[str, str] | None:
    """The first two names of one shared tensor of which the edits would cut only one, or each differently."""
    cuts: dict[str, list[Keep]] = defaultdict(list)
    for edit in edits:
        if isinstance(edit, Keep):
            for name, axis in edit.axes:
                cuts[name].append(Keep(size=edit.size, kept=edit.kept, axes=(("", axis),)))
    first: dict[int, str] = {}
    for name, tensor in _tensors(model):
        other = first.setdefault(id(tensor), name)
        if cuts[name] != cuts[other]:
            return other, name
    return None


def encode_positions(model: nn.Module) -> None:
    """Overwrite every tensor of a throwaway copy by the position of each of its elements.

    Whatever a pruner then cuts out, `derive` reads from the surviving numbers which indices were kept. Positions are
    written as integers into the bits of the parameters, exact for up to 2^31 elements of float32; buffers, which may
    hold booleans, become integers. The model computes nothing sensible afterwards.
    """
    for parameter in model.parameters():
        integer = _INTEGER_OF[parameter.element_size()]
        if parameter.numel() - 1 > torch.iinfo(integer).max:
            raise CheckpointError(f"a tensor of {parameter.numel():,} {parameter.dtype} elements is too large to prune")
        parameter.data.copy_(torch.arange(parameter.numel(), dtype=integer).view(parameter.dtype).view(parameter.shape))
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.arange(buffer.numel()).view(buffer.shape)


def derive(before: nn.Module, after: nn.Module) -> tuple[Edit, ...]:
    """The edits that make `after`, a copy of `before` with encoded positions that a pruner has cut, out of `before`.

    Raises:
        ValueError: where a tensor of `after` is no selection of whole slices of its original.
    """
    originals = dict(_tensors(before))
    cuts: dict[tuple[int, tuple[int, ...]], list[tuple[str, int]]] = defaultdict(list)
    for name, tensor in _tensors(after):
        shape = tuple(originals[name].shape)
        if not shape:
            continue
        for axis, kept in enumerate(_kept_indices(name, tensor, shape)):
            if kept != tuple(range(shape[axis])):
                cuts[shape[axis], kept].append((name, axis))
    keeps = [Keep(size=size, kept=kept, axes=tuple(axes)) for (size, kept), axes in cuts.items()]
    return (*keeps, *_changed_attributes(before, after))


def _tensors(model: nn.Module) -> Iterable[tuple[str, Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _kept_indices(name: str, tensor: Tensor, shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    codes = tensor.detach().contiguous().view(_INTEGER_OF[tensor.element_size()]).numpy()
    if codes.ndim != len(shape) or codes.size == 0:
        raise ValueError(f"{name}: shape {tuple(codes.shape)} is no selection from {shape}")
    strides = [int(np.prod(shape[axis + 1 :])) for axis in range(len(shape))]
    kept = []
    for axis, stride in enumerate(strides):
        along = codes[tuple(slice(None) if a == axis else 0 for a in range(codes.ndim))].astype(np.int64)
        kept.append(along // stride % shape[axis])
    expected = sum(
        indices.reshape([-1 if a == axis else 1 for a in range(codes.ndim)]) * strides[axis]
        for axis, indices in enumerate(kept)
    )
    if not np.array_equal(codes, np.broadcast_to(expected, codes.shape)):
        raise ValueError(f"{name}: what was kept is no selection of whole slices")
    return [tuple(int(index) for index in indices) for indices in kept]


def _changed_attributes(before: nn.Module, after: nn.Module) -> Iterable[Attribute]:
    originals = dict(before.named_modules())
    for path, module in after.named_modules():
        for name, value in vars(module).items():
            old = vars(originals[path]).get(name)
            if name.startswith("_") or not (_is_shape(value) and _is_shape(old)) or value == old:
                continue
            yield Attribute(module=path, name=name, value=value)


def _is_shape(value: object) -> bool:
    if isinstance(value, tuple):
        return bool(value) and all(isinstance(item, int) and not isinstance(item, bool) for item in value)
    return isinstance(value, int) and not isinstance(value, bool)


def _module(model: nn.Module, path: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError:
        raise CheckpointError(f"the edits name the module '{path}', which the architecture does not have") from None


def _keep(model: nn.Module, edit: Keep) -> None:
    # Tied tensors stay tied. The old ones are kept alive, lest a new one gets the identity of one that is gone.
    replaced: dict[int, tuple[Tensor, Tensor]] = {}
    done: set[tuple[int, str, int]] = set()
    for name, axis in edit.axes:
        path, _, leaf = name.rpartition(".")
        module = _module(model, path)
        old = module._parameters.get(leaf, module._buffers.get(leaf))
        if old is None:
            raise CheckpointError(f"the edits name the tensor '{name}', which the architecture does not have")
        if (id(module), leaf, axis) in done:  # a module of two names was cut under the first
            continue
        done.add((id(module), leaf, axis))
        if axis >= old.dim() or old.shape[axis] != edit.size or max(edit.kept) >= edit.size:
            raise CheckpointError(
                f"the edits keep {len(edit.kept)} of {edit.size} indices of axis {axis} of '{name}', "
                f"whose shape is {tuple(old.shape)}"
            )
        if id(old) not in replaced:
            index = torch.tensor(edit.kept, device=old.device)
            new = old.detach().index_select(axis, index)
            replaced[id(old)] = old, nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
        _, new = replaced[id(old)]
        if leaf in module._parameters:
            setattr(module, leaf, new)
        else:
            module._buffers[leaf] = new


def _set_attribute(model: nn.Module, edit: Attribute) -> None:
    module = _module(model, edit.module)
    old = vars(module).get(edit.name)
    if not _is_shape(old) or type(old) is not type(edit.value):
        raise CheckpointError(
            f"the edits set '{edit.module}.{edit.name}' to {edit.value!r}, which is no shape of the architecture"
        )
    setattr(module, edit.name, edit.value)


def _factor(model: nn.Module, edit: Factor) -> None:
    layer = _module(model, edit.module)
    pair = factor_pair(layer, 1) if edit.module else None
    if pair is None:
        raise CheckpointError(f"the edits factorize '{edit.module}', a {type(layer).__name__}, which has no such form")
    weight = layer.get_parameter("weight")
    if edit.rank > (largest := min(weight.shape[0], weight[0].numel())):
        raise CheckpointError(
            f"the edits factorize '{edit.module}' with rank {edit.rank}; its rank is at most {largest}"
        )
    pair = factor_pair(layer, edit.rank, bias=edit.bias)
    parent, _, leaf = edit.module.rpartition(".")
    setattr(_module(model, parent), leaf, pair)


def factor_pair(layer: nn.Module, rank: int, *, bias: bool = False) -> nn.Sequential | None:
    """Two uninitialised layers of `rank` channels between them that can stand for `layer`; None where none can.

    The second has a bias where the layer has one, or where `bias` asks for one.
    """
    with torch.random.fork_rng(devices=[]):  # the initialisation is overwritten; it must not shift the seed
        pair = _pair(layer, rank, bias=bias or getattr(layer, "bias", None) is not None)
    if pair is None:
        return None
    weight = layer.get_parameter("weight")
    return pair.to(device=weight.device, dtype=weight.dtype).train(layer.training)


def _pair(layer: nn.Module, rank: int, *, bias: bool) -> nn.Sequential | None:
    # Attention computes with the weight of its output projection itself; nothing can stand for that layer.
    if isinstance(layer, nn.Linear) and not isinstance(layer, nn.modules.linear.NonDynamicallyQuantizableLinear):
        second = nn.Linear(rank, layer.out_features, bias=bias)
        return nn.Sequential(nn.Linear(layer.in_features, rank, bias=False), second)
    if isinstance(layer, nn.Conv2d) and layer.groups == 1 and layer.padding_mode == "zeros":
        first = nn.Conv2d(
            layer.in_channels,
            rank,
            _two(layer.kernel_size),
            stride=_two(layer.stride),
            padding=layer.padding if isinstance(layer.padding, str) else _two(layer.padding),
            dilation=_two(layer.dilation),
            bias=False,
        )
        return nn.Sequential(first, nn.Conv2d(rank, layer.out_channels, 1, bias=bias))
    return None


def _two(values: tuple[int, ...]) -> tuple[int, int]:
    height, width = values
    return height, width


def is_factor_of(name: str, edits: Iterable[Edit]) -> bool:
    """Whether the layer `name` is one half of a layer that was factorized before."""
    made = {edit.module for edit in edits if isinstance(edit, Factor)}
    return re.sub(r"\.[01]$", "", name) in made
