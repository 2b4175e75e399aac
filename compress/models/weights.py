"""Weights from files and from published sets into a model, strictly: every name and shape must fit."""

from __future__ import annotations

import pickle
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from compress.errors import ModelError, listed, nearest
from compress.models.factory import Arch

_SHOWN = 3
_OLD_DENSENET = re.compile(r"(denselayer\d+\.(?:norm|conv))\.(\d)\.")
_WRAPPERS = ("state_dict", "model_state_dict", "model")


def read_weights(path: Path) -> dict[str, Tensor]:
    """State dict from `.safetensors`, or from a `.pth` file without running any code in it.

    Wrappers such as `{"state_dict": …}` and the `module.` prefix of data-parallel training are taken off.

    Raises:
        ModelError: where the file is missing, damaged, or holds more than tensors.
    """
    if not path.is_file():
        near = nearest(path.name, (p.name for p in path.parent.glob("*"))) if path.parent.is_dir() else ""
        raise ModelError(f"model.weights: {path}: no such file{near}")
    try:
        if path.suffix == ".safetensors":
            return _without_prefix(load_file(path))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of pickle's dialects; they load or they do not
            content = torch.load(path, map_location="cpu", weights_only=True)
    except SafetensorError as error:
        raise ModelError(f"model.weights: {path}: is no valid safetensors file: {error}") from None
    except pickle.UnpicklingError:
        raise ModelError(
            f"model.weights: {path}: holds Python objects besides tensors, which could run code; "
            "save the state dict alone: torch.save(model.state_dict(), …), better: safetensors"
        ) from None
    except Exception as error:  # what a damaged file raises depends on where it is damaged
        reason = str(error).strip().splitlines()
        raise ModelError(
            f"model.weights: {path}: cannot be read: {reason[0] if reason else type(error).__name__}"
        ) from error
    for wrapper in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ModelError(f"model.weights: {path}: is no state dict (a mapping from names to tensors)")
    return _without_prefix(content)


def _without_prefix(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    wrapped = bool(state) and all(name.startswith("module.") for name in state)
    return {name.removeprefix("module.") if wrapped else name: tensor for name, tensor in state.items()}


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
    missing = [name for name in missing if not name.endswith("num_batches_tracked")]
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
        raise ModelError(f"{what}: does not fit the model: {'; '.join(parts)}")
    model.load_state_dict(state, strict=False, assign=assign)


def _named(names: list[str], tensors: Mapping[str, Any]) -> str:
    return ", ".join(f"'{name}' {tuple(tensors[name].shape)}" for name in names[:_SHOWN])
