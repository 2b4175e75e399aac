"""The only code that changes a module tree: replays edits, and derives them from what a pruner did to a copy."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from compress.edits import Attribute, Edit, Factor, Keep, Split
from compress.errors import CheckpointError

_INTEGER_OF = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_NO_VALUES = {getattr(Tensor, name).__get__ for name in ("shape", "device", "dtype", "grad", "requires_grad", "layout")}
"""What is asked of a tensor that does not depend on its values."""


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
    """Put in place of every tensor of a throwaway copy the position of each of its elements.

    Whatever a pruner then cuts out, `derive` reads from the surviving numbers which indices were kept. Positions are
    written as integers into the bits of the parameters, exact for up to 2^31 elements of float32; buffers, which may
    hold booleans, become integers. The model computes nothing sensible afterwards. What lay in the memory of the old
    tensors stays there.
    """
    for parameter in model.parameters():
        parameter.data = _positions(parameter)
    _encode_buffers(model)


class PositionsWhenRead(TorchFunctionMode):
    """A context in which a pruner reads positions, see `encode_positions`, in the parameters of a throwaway copy.

    Only what it makes of them takes memory. Parameters that it leaves as they are stay as they are; `derive` knows them by
    their memory, which must be that of the model before.
    """

    def __init__(self, model: nn.Module) -> None:
        """Take the throwaway copy, one that shares the memory of the model that is left as it is."""
        super().__init__()
        self._read_as_positions = {id(parameter): parameter for parameter in model.parameters()}
        for parameter in self._read_as_positions.values():
            _integers(parameter)
        _encode_buffers(model)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Compute with positions in place of parameters."""
        kwargs = kwargs or {}
        if func in _NO_VALUES:
            return func(*args, **kwargs)
        return func(*map(self._read, args), **{key: self._read(value) for key, value in kwargs.items()})

    def _read(self, value: Any) -> Any:
        return _positions(value) if id(value) in self._read_as_positions else value


def _integers(tensor: Tensor) -> torch.dtype:
    """What positions in a tensor are written as."""
    integer = _INTEGER_OF[tensor.element_size()]
    if tensor.numel() - 1 > torch.iinfo(integer).max:
        raise CheckpointError(f"a tensor of {tensor.numel():,} {tensor.dtype} elements is too large to prune")
    return integer


def _positions(tensor: Tensor) -> Tensor:
    return torch.arange(tensor.numel(), dtype=_integers(tensor)).view(tensor.dtype).view(tensor.shape)


def _encode_buffers(model: nn.Module) -> None:
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.arange(buffer.numel()).view(buffer.shape)


def derive(before: nn.Module, after: nn.Module) -> tuple[Edit, ...]:
    """The edits that make `after`, a copy of `before` with encoded positions that a pruner has cut, out of `before`.

    Tensors of `after` in the memory of those of `before` are whole.

    Raises:
        ValueError: where a tensor of `after` is no selection of whole slices of its original.
    """
    originals = dict(_tensors(before))
    cuts: dict[tuple[int, tuple[int, ...]], list[tuple[str, int]]] = defaultdict(list)
    for name, tensor in _tensors(after):
        shape = tuple(originals[name].shape)
        unread = tensor.data_ptr() == originals[name].data_ptr() and tuple(tensor.shape) == shape
        if not shape or unread:
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
    axes: dict[tuple[str, str], list[int]] = {}
    for name, axis in edit.axes:
        path, _, leaf = name.rpartition(".")
        axes.setdefault((path, leaf), []).append(axis)
    # Tied tensors stay tied. The old ones are kept alive, lest a new one gets the identity of one that is gone.
    replaced: dict[tuple[int, tuple[int, ...]], tuple[Tensor, Tensor]] = {}
    done: dict[tuple[int, str], set[int]] = {}
    for (path, leaf), named in axes.items():
        module = _module(model, path)
        old = module._parameters.get(leaf, module._buffers.get(leaf))
        if old is None:
            name = f"{path}.{leaf}" if path else leaf
            raise CheckpointError(f"the edits name the tensor '{name}', which the architecture does not have")
        before = done.setdefault((id(module), leaf), set())  # a module of two names is cut under the first
        left = tuple(sorted(set(named) - before))  # one order, as tied tensors are known by it
        if not left:
            continue
        before.update(left)
        if (id(old), left) not in replaced:
            replaced[id(old), left] = old, _kept(f"{path}.{leaf}" if path else leaf, old, left, edit)
        _, new = replaced[id(old), left]
        if leaf in module._parameters:
            setattr(module, leaf, new)
        else:
            module._buffers[leaf] = new


def _kept(name: str, old: Tensor, axes: Sequence[int], edit: Keep) -> Tensor:
    """What an edit leaves of a tensor: all axes at once, so that only the last of its cuts stays in memory."""
    new, index = old.detach(), torch.tensor(edit.kept, device=old.device)
    for axis in axes:
        if axis >= old.dim() or old.shape[axis] != edit.size or max(edit.kept) >= edit.size:
            raise CheckpointError(
                f"the edits keep {len(edit.kept)} of {edit.size} indices of axis {axis} of '{name}', "
                f"whose shape is {tuple(old.shape)}"
            )
        new = new.index_select(axis, index)
    return nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new


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
    pair = factor_pair(layer, 1, split=edit.split, rank_in=edit.rank_in and 1) if edit.module else None
    if pair is None:
        raise CheckpointError(f"the edits factorize '{edit.module}', a {type(layer).__name__}, which has no such form")
    largest = largest_rank(layer.get_parameter("weight").shape, edit.split, edit.rank_in)
    if edit.rank > largest:
        raise CheckpointError(
            f"the edits factorize '{edit.module}' with rank {edit.rank}; its rank is at most {largest}"
        )
    if edit.rank_in is not None and edit.rank_in > (
        most := largest_rank_in(layer.get_parameter("weight").shape, edit.rank)
    ):
        raise CheckpointError(
            f"the edits factorize '{edit.module}' with rank {edit.rank_in} of its inputs; beside rank {edit.rank} it is at "
            f"most {most}"
        )
    parts = factor_pair(layer, edit.rank, split=edit.split, rank_in=edit.rank_in, bias=edit.bias)
    parent, _, leaf = edit.module.rpartition(".")
    setattr(_module(model, parent), leaf, parts)


def largest_rank(shape: Sequence[int], split: Split, rank_in: int | None = None) -> int:
    """The largest rank of a form for a weight (out, in) or (out, in, h, w), beside `rank_in` where that has one."""
    out, inp, *kernel = shape
    if split == "spatial":
        height, width = kernel
        return min(out * width, inp * height)
    return min(out, (inp if rank_in is None else rank_in) * math.prod(kernel))


def largest_rank_in(shape: Sequence[int], rank: int) -> int:
    """The largest second rank of a `tucker` form for a weight (out, in, h, w), beside `rank`."""
    _, inp, height, width = shape
    return min(inp, rank * height * width)


def factor_pair(
    layer: nn.Module, rank: int, *, split: Split = "channel", rank_in: int | None = None, bias: bool = False
) -> nn.Sequential | None:
    """Two uninitialised layers of `rank` channels between them that can stand for `layer`; None where none can.

    The last has a bias where the layer has one, or where `bias` asks for one.

    Args:
        layer: it stays as it is.
        rank: channels before the last one.
        split: the form, see `Factor`; a linear layer has 'channel' only.
        rank_in: channels after the first of the three of 'tucker'.
        bias: whether the last has a bias even where the layer has none.
    """
    has_bias = bias or getattr(layer, "bias", None) is not None
    with torch.random.fork_rng(devices=[]):  # the initialisation is overwritten; it must not shift the seed
        parts = _parts(layer, rank, split, rank_in, bias=has_bias)
    if parts is None:
        return None
    weight = layer.get_parameter("weight")
    return nn.Sequential(*parts).to(device=weight.device, dtype=weight.dtype).train(layer.training)


def _parts(layer: nn.Module, rank: int, split: Split, rank_in: int | None, *, bias: bool) -> Sequence[nn.Module] | None:
    # Attention computes with the weight of its output projection itself; nothing can stand for that layer.
    if isinstance(layer, nn.Linear) and not isinstance(layer, nn.modules.linear.NonDynamicallyQuantizableLinear):
        if split != "channel":
            return None
        return nn.Linear(layer.in_features, rank, bias=False), nn.Linear(rank, layer.out_features, bias=bias)
    if not (isinstance(layer, nn.Conv2d) and layer.groups == 1 and layer.padding_mode == "zeros"):
        return None
    if split == "spatial":
        return _along(layer, 0, layer.in_channels, rank), _along(layer, 1, rank, layer.out_channels, bias=bias)
    last = nn.Conv2d(rank, layer.out_channels, 1, bias=bias)
    if rank_in is None:
        return _along(layer, None, layer.in_channels, rank), last
    return nn.Conv2d(layer.in_channels, rank_in, 1, bias=False), _along(layer, None, rank_in, rank), last


def _along(layer: nn.Conv2d, axis: int | None, inp: int, out: int, *, bias: bool = False) -> nn.Conv2d:
    """A convolution with the geometry of `layer` along one axis (0 is vertical) and none along the other; None: both."""

    def part(values: tuple[int, ...], neutral: int) -> tuple[int, int]:
        height, width = values
        return height if axis in (0, None) else neutral, width if axis in (1, None) else neutral

    return nn.Conv2d(
        inp,
        out,
        part(layer.kernel_size, 1),
        stride=part(layer.stride, 1),
        # 'same' and 'valid' say for each axis alone what they say for both.
        padding=layer.padding if isinstance(layer.padding, str) else part(layer.padding, 0),
        dilation=part(layer.dilation, 1),
        bias=bias,
    )


def is_factor_of(name: str, edits: Iterable[Edit]) -> bool:
    """Whether the layer `name` is a part of a layer that was factorized before."""
    parent, _, leaf = name.rpartition(".")
    parts = {"channel": ("0", "1"), "spatial": ("0", "1"), "tucker": ("0", "1", "2")}
    return any(isinstance(edit, Factor) and edit.module == parent and leaf in parts[edit.split] for edit in edits)
