"""Weights from files and from published sets into a model, strictly: every name and shape must fit."""

from __future__ import annotations

import pickle
import re
import warnings
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from compress.errors import ModelError, listed, nearest
from compress.models.factory import Arch
from compress.names import near_path

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
        raise ModelError(f"model.weights: {path}: no such file{near_path(path)}")
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
        if averages:
            note(f"{path.name}: the weights under '{key}' are taken, not the averaged ones under '{averages[0]}'")
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


def fitting(state: Mapping[str, Tensor], names: Collection[str]) -> dict[str, Tensor]:
    """The state under the names that the model gives its tensors, as far as prefixes make the difference.

    `torch.compile` puts `_orig_mod.` into names, data-parallel training `module.` before them, averaging and training
    frameworks other prefixes and a counter `n_averaged`. A prefix goes where all names have it and fit without it; where
    nothing fits, the state stays nearly as it is, for the message.

    Args:
        state: tensors by name.
        names: those of the model.
    """
    wanted = {name for name in names if not name.endswith(_COUNTER)}
    plain = {name.replace(_COMPILED, ""): tensor for name, tensor in state.items()}
    if wanted <= state.keys():
        return dict(state)
    candidates = [plain]
    if len(plain) > 1 and "n_averaged" not in wanted:
        plain = {name: tensor for name, tensor in plain.items() if name != "n_averaged"}
        candidates.append(plain)
    while True:
        first = {name.partition(".")[0] for name in plain}
        if len(first) != 1 or not all("." in name for name in plain):
            break
        plain = {name.partition(".")[2]: tensor for name, tensor in plain.items()}
        candidates.append(plain)
    return max(candidates, key=lambda candidate: len(wanted & candidate.keys()))


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
