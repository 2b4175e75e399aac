"""A state dict into a model, strictly: its names as the model has them, every name and shape fits, values are finite."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from compress.errors import ModelError, listed

Note = Callable[[str], None]
# Under which names training scripts keep the state dict of the trained weights.
WRAPPERS = ("state_dict", "model_state_dict", "model_state", "model", "net", "network", "module", "weights")
_SHOWN = 3
_COMPILED = "_orig_mod."
_COUNTER = "num_batches_tracked"


def ignore(_: str) -> None:
    """A `Note` that goes nowhere."""


def bare_names(state: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A state under names without what wrappers put into them, and so on without each prefix that all of them have."""
    plain = {name.replace(_COMPILED, ""): tensor for name, tensor in state.items()}
    found = [plain]
    if len(plain) > 1 and "n_averaged" in plain:
        plain = {name: tensor for name, tensor in plain.items() if name != "n_averaged"}
        found.append(plain)
    while len({name.partition(".")[0] for name in plain}) == 1 and all("." in name for name in plain):
        plain = {name.partition(".")[2]: tensor for name, tensor in plain.items()}
        found.append(plain)
    return found


def fitting(
    state: Mapping[str, Tensor], model: Mapping[str, Tensor], what: str = "model.weights", note: Note = ignore
) -> dict[str, Tensor]:
    """The state under the names that the model gives its tensors, as far as prefixes make the difference.

    `torch.compile` puts `_orig_mod.` into names, data-parallel training `module.` before them, averaging and training
    frameworks other prefixes and a counter `n_averaged`. A prefix goes where all names have it and fit without it. Where
    only some have it, as in a file that holds a loss beside the model, they are taken where they fit the model exactly.
    Where nothing fits, the state stays nearly as it is, for the message.

    Args:
        state: tensors by name.
        model: the model's own tensors by name.
        what: where the state comes from, for messages.
        note: told of tensors that are left over.

    Raises:
        ModelError: where names differ by `_orig_mod.` alone.
    """
    wanted = {name for name in model if not name.endswith(_COUNTER)}
    if wanted <= state.keys():
        return dict(state)
    for name in state:
        if _COMPILED in name and (other := name.replace(_COMPILED, "")) in state:
            raise ModelError(
                f"{what}: holds '{other}' and, from torch.compile, '{name}', which mean the same tensor; keep one of them"
            )
    candidates = bare_names(state)
    if part := _part_that_fits(candidates[-1], model):
        prefix, inner = part
        rest = [name for name in candidates[-1] if not name.startswith(prefix)]
        note(
            f"{what.removeprefix('model.weights: ')}: the weights under '{prefix}' are taken; left over: {listed(rest, _SHOWN)}"
        )
        return inner
    return max(candidates, key=lambda candidate: len(wanted & candidate.keys()))


def _part_that_fits(state: Mapping[str, Tensor], model: Mapping[str, Tensor]) -> tuple[str, dict[str, Tensor]] | None:
    """The prefix under which lies exactly what the model needs, and what that is; None where no or no single one does."""
    found = []
    prefixes = {f"{name.partition('.')[0]}." for name in state if "." in name}
    for prefix in sorted(prefixes):
        below = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
        found += [(prefix, inner) for inner in bare_names(below) if _fits_exactly(inner, model)][:1]
    wrapped = [part for part in found if part[0][:-1] in WRAPPERS]
    return found[0] if len(found) == 1 else wrapped[0] if len(wrapped) == 1 else None


def _fits_exactly(state: Mapping[str, Tensor], model: Mapping[str, Tensor]) -> bool:
    """Whether all names and shapes are the model's, counters and second names of tied tensors aside."""
    has = state.keys() | {name for names in ties(model) if state.keys() & set(names) for name in names}
    return (
        state.keys() <= model.keys()
        and all(name in has or name.endswith(_COUNTER) for name in model)
        and all(tensor.shape == model[name].shape for name, tensor in state.items())
    )


def ties(tensors: Mapping[str, Tensor]) -> list[list[str]]:
    """Groups of names that stand for one and the same tensor."""
    groups: dict[object, list[str]] = {}
    for name, tensor in tensors.items():
        # A state dict holds its tensors detached: the place in memory is what tells them.
        place = (tensor.data_ptr(), tensor.shape, tensor.stride()) if tensor.numel() else name
        groups.setdefault(place, []).append(name)
    return [names for names in groups.values() if len(names) > 1]


def with_ties(state: Mapping[str, Tensor], model: Mapping[str, Tensor], what: str) -> dict[str, Tensor]:
    """The state with a tensor for each name of those that the model ties; files often hold only one of them.

    Args:
        state: tensors by the model's names.
        model: the model's own tensors by name, on a device that holds values.
        what: where the state comes from, for the message.

    Raises:
        ModelError: where the state has different values for one tensor.
    """
    filled = dict(state)
    for names in ties(model):
        first, *others = [name for name in names if name in state] or names[:1]
        for other in others:
            if state[first].shape == state[other].shape and not _same_values(state[first], state[other]):
                raise ModelError(
                    f"{what}: has different values for '{first}' and '{other}', which are one tensor in the model"
                )
        if first in state:
            filled |= {name: state[first] for name in names if name not in state}
    return filled


def _same_values(one: Tensor, other: Tensor) -> bool:
    return bool(((one == other) | (one.isnan() & other.isnan())).all())


def check_finite(model: nn.Module, what: str) -> None:
    """Refuse parameters and statistics of norms that are not finite, and any tensor that holds what is no number.

    Other buffers may hold infinities: masks do.

    Raises:
        ModelError: naming the first tensor.
    """
    norms = {name for name, module in model.named_modules() if isinstance(module, nn.modules.batchnorm._NormBase)}
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for name, tensor in model.state_dict().items():
        learned = name in parameters or name.rpartition(".")[0] in norms
        bad = ~torch.isfinite(tensor) if learned else torch.isnan(tensor)
        if tensor.is_floating_point() and bool(bad.any()):
            raise ModelError(f"{what}: '{name}' holds values that are not finite")


def load_state(model: nn.Module, state: Mapping[str, Tensor], what: str, *, assign: bool = False) -> None:
    """Load `state` into `model`; every tensor must be there with its shape, and no other.

    Args:
        model: changed in place.
        state: names and tensors.
        what: where the state comes from, for the message.
        assign: take the tensors themselves, in their own dtype, rather than copy into the model's; needed on meta.

    Raises:
        ModelError: naming the first leaves that differ, with expected and found shapes.
    """
    expected = model.state_dict()
    missing = [name for name in expected if name not in state]
    unexpected = [name for name in state if name not in expected]
    shapes = [name for name in expected if name in state and expected[name].shape != state[name].shape]
    # Weights saved before BatchNorm counted batches lack the counters, which nothing reads in inference.
    missing = [name for name in missing if not name.endswith(_COUNTER)]
    parts = []
    if missing:
        parts.append(f"{len(missing)} tensors are missing, first {_named(missing, expected)}")
    if unexpected:
        parts.append(f"{len(unexpected)} tensors have no place in the model, first {_named(unexpected, state)}")
    if shapes:
        first = ", ".join(
            f"'{name}' (model {tuple(expected[name].shape)}, file {tuple(state[name].shape)})"
            for name in shapes[:_SHOWN]
        )
        parts.append(f"{len(shapes)} tensors have another shape, first {first}")
    if parts:
        hint = (
            ""
            if assign or missing or unexpected
            else _shape_hint(
                [(expected[name].shape, state[name].shape) for name in shapes],
                at_the_end=bool(shapes) and shapes[-1] == list(expected)[-1],
            )
        )
        raise ModelError(f"{what}: does not fit the model: {'; '.join(parts)}{hint}")
    if not assign:
        _check_kinds(expected, state, what)
    model.load_state_dict(state, strict=False, assign=assign)


def _shape_hint(shapes: list[tuple[torch.Size, torch.Size]], *, at_the_end: bool) -> str:
    """What is probably meant where the names agree and a few shapes do not; (model, file) each.

    Args:
        shapes: those that differ.
        at_the_end: whether the model's last tensor is among them.
    """
    outputs = {(model[:1], file[:1]) for model, file in shapes}
    if at_the_end and len(outputs) == 1 and len(shapes) <= 2 and all(model[1:] == file[1:] for model, file in shapes):
        ((model, file),) = outputs
        if len(model) == 1 and model != file:
            return (
                f"; only the last layer differs: the file is for {file[0]} classes, the model is made for {model[0]}: set "
                f"model.kwargs: {{num_classes: {file[0]}}}, or what its factory calls it, if the data has {file[0]} classes; "
                f"else train the model on this data first, and give the weights of that"
            )
    if len(shapes) == 1:
        ((model, file),) = shapes
        if (
            len(model) > 1
            and len(file) == len(model)
            and model[1] != file[1]
            and (*model[:1], *model[2:]) == (*file[:1], *file[2:])
        ):
            return (
                f"; only one layer differs, by what it takes: the file is for {file[1]} channels, the model is made for "
                f"{model[1]}: set model.kwargs: {{in_channels: {file[1]}}}, or what its factory calls it"
            )
    return "; these are weights of another variant of this architecture: check model.kwargs" if shapes else ""


def _check_kinds(expected: Mapping[str, Tensor], state: Mapping[str, Tensor], what: str) -> None:
    """Copying would turn whole numbers into fractions, and the reverse, without a word."""
    for name, tensor in state.items():
        if name in expected and (
            tensor.is_floating_point() != expected[name].is_floating_point() or tensor.is_quantized
        ):
            raise ModelError(
                f"{what}: does not fit the model: '{name}' is {tensor.dtype}, the model has {expected[name].dtype}"
            )


def _named(names: list[str], tensors: Mapping[str, Any]) -> str:
    return ", ".join(f"'{name}' {tuple(tensors[name].shape)}" for name in names[:_SHOWN])
