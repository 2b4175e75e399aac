"""Weights from files and from published sets into a model, strictly: every name and shape must fit."""

from __future__ import annotations

import pickle
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from compress.errors import ModelError, listed, nearest
from compress.models.factory import Arch
from compress.names import WEIGHTS_ENDINGS, near_path

Note = Callable[[str], None]
_SHOWN = 3
_OLD_DENSENET = re.compile(r"(denselayer\d+\.(?:norm|conv))\.(\d)\.")
# Under which names training scripts keep the state dict, those of the trained weights before those of their average.
_WRAPPERS = ("state_dict", "model_state_dict", "model_state", "model", "net", "network", "module", "weights")
_AVERAGES = ("state_dict_ema", "ema_state_dict", "model_ema", "ema")
_MAX_WRAPPERS = 3
_COMPILED = "_orig_mod."
_COUNTER = "num_batches_tracked"
_START_BYTES = 64
_DAMAGED = "the file is damaged, cut short, or no file of weights; download or copy it again"
_ALONE = "save the state dict alone: torch.save(model.state_dict(), …), better: safetensors"


def ignore(_: str) -> None:
    """A `Note` that goes nowhere."""


def read_weights(path: Path, note: Note = ignore) -> dict[str, Tensor]:
    """State dict from `.safetensors`, or from a `.pth` file without running any code in it.

    Wrappers such as `{"state_dict": …, "epoch": 3}` are taken off; names stay as they are, see `fitting`.

    Args:
        path: the file.
        note: told where the file holds more than one set of weights.

    Raises:
        ModelError: where the file is missing, damaged, or holds more than tensors and plain values.
    """
    if not path.is_file():
        raise ModelError(f"model.weights: {path}: no such file{near_path(path, WEIGHTS_ENDINGS)}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of pickle's dialects; they load or they do not
            content = torch.load(path, map_location="cpu", weights_only=True)
    except SafetensorError as error:
        raise ModelError(f"model.weights: {path}: is no valid safetensors file ({error}); {_DAMAGED}") from None
    except pickle.UnpicklingError as error:
        raise ModelError(f"model.weights: {path}: {_why_unreadable(path, str(error))}") from None
    except Exception as error:  # what a damaged file raises depends on where it is damaged
        raise ModelError(f"model.weights: {path}: {_why_unreadable(path, str(error))}") from error
    return _unwrapped(content, path, note)


def _why_unreadable(path: Path, error: str) -> str:
    """What is wrong with a `.pth` file, and what to do, from torch's error and the first bytes."""
    foreign = re.search(r"GLOBAL ([\w.]+)", error)
    if foreign:
        return f"holds Python objects besides tensors, which could run code; {_ALONE} (the first: {foreign[1]})"
    if "TorchScript" in error:
        return f"is a TorchScript archive, which holds code; {_ALONE}"
    with path.open("rb") as file:
        start = file.read(_START_BYTES)
    if start.startswith(b"version https://git-lfs"):
        return "is a pointer of Git LFS, not the file itself; fetch it with: git lfs pull"
    if start.lstrip()[:1] == b"<":
        return "is a web page, not a file of weights; the download went wrong"
    if not start:
        return "is empty"
    return f"cannot be read; {_DAMAGED}"


def _unwrapped(content: Any, path: Path, note: Note) -> dict[str, Tensor]:
    """The state dict inside what a training script saved."""
    for _ in range(_MAX_WRAPPERS):
        if not isinstance(content, Mapping) or (content and all(isinstance(v, Tensor) for v in content.values())):
            break
        inner = {key: value for key, value in content.items() if isinstance(value, Mapping)}
        known = [key for key in (*_WRAPPERS, *_AVERAGES) if key in inner]
        # Under any other name, where there is no doubt.
        others = [key for key, value in inner.items() if value and all(isinstance(v, Tensor) for v in value.values())]
        if not known and len(others) != 1:
            break
        key = known[0] if known else others[0]
        averages = [name for name in known if name in _AVERAGES and name != key]
        whole = [name for name in others if name not in (key, *averages) and _same_names(inner[name], inner[key])]
        aside = [f"those under {_quoted(whole)}"] * bool(whole)
        aside += [f"the averaged ones under {_quoted(averages)}"] * bool(averages)
        if aside:
            note(f"{path.name}: the weights under '{key}' are taken, not {', nor '.join(aside)}")
        content = inner[key]
    if not isinstance(content, Mapping):
        raise ModelError(
            f"model.weights: {path}: is no state dict (a mapping from names to tensors) but a {type(content).__name__}"
        )
    for key, value in content.items():
        if not isinstance(value, Tensor):
            raise ModelError(
                f"model.weights: {path}: is no state dict (a mapping from names to tensors): '{key}' is a "
                f"{type(value).__name__}; it holds {listed(map(str, content))}"
            )
    return {str(name): tensor for name, tensor in content.items()}


def _same_names(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two sets of tensors have the same names, but for prefixes that all names of a set have."""
    first, second = (_bare({str(name): None for name in names})[-1].keys() for names in (one, other))
    return first == second


def _quoted(names: Iterable[str]) -> str:
    return listed(f"'{name}'" for name in names)


def _bare(state: Mapping[str, Any]) -> list[dict[str, Any]]:
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
    candidates = _bare(state)
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
        found += [(prefix, inner) for inner in _bare(below) if _fits_exactly(inner, model)][:1]
    wrapped = [part for part in found if part[0][:-1] in _WRAPPERS]
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


def check_finite(state: Mapping[str, Tensor], what: str) -> None:
    """Refuse infinities and what is no number.

    Raises:
        ModelError: naming the first tensor that holds one.
    """
    for name, tensor in state.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ModelError(f"{what}: '{name}' holds values that are not finite")


def published_weights(arch: Arch, name: str) -> Mapping[str, Tensor]:
    """Published weights of a torchvision or timm model, fetched by that library.

    Raises:
        ModelError: where there are none of that name, or they cannot be fetched.
    """
    scheme, _, builder = arch.factory.rpartition(":")
    try:
        if scheme == "torchvision":
            from torchvision import models

            known = models.get_model_weights(builder)
            if name not in known.__members__:
                names = list(known.__members__)
                raise ModelError(
                    f"model.weights: '{arch.factory}' has {listed(names)}, not '{name}'{nearest(name, names)}"
                )
            state: Mapping[str, Tensor] = known[name].get_state_dict(progress=False, check_hash=True, weights_only=True)
            # DenseNet's files still have the names of torch 0.4, which torchvision's own loader mends as well.
            return {_OLD_DENSENET.sub(r"\1\2.", key): tensor for key, tensor in state.items()}
        if scheme == "timm" and name == "pretrained":
            import timm

            fetched: Mapping[str, Tensor] = timm.create_model(builder, pretrained=True, **arch.kwargs).state_dict()
            return fetched
    except ModelError:
        raise
    except Exception as error:  # each library has its own errors of the network
        raise ModelError(
            f"model.weights: '{name}' of '{arch.factory}' cannot be fetched: {error}; "
            "download the file where there is a network and give its path"
        ) from error
    allowed = "'pretrained'" if scheme == "timm" else "a .safetensors or .pth file"
    raise ModelError(f"model.weights: '{arch.factory}' takes {allowed}, got '{name}'")


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
