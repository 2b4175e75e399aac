"""State dicts from files and from published sets of weights."""

from __future__ import annotations

import pickle
import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from compress.errors import ModelError, listed, nearest
from compress.models.factory import Arch
from compress.models.state import WRAPPERS, Note, bare_names, ignore
from compress.names import WEIGHTS_ENDINGS, near_path

_OLD_DENSENET = re.compile(r"(denselayer\d+\.(?:norm|conv))\.(\d)\.")
# Under which names training scripts keep the averages of the trained weights; those themselves come first.
_AVERAGES = ("state_dict_ema", "ema_state_dict", "model_ema", "ema")
_MAXWRAPPERS = 3
_START_BYTES = 64
_DAMAGED = "the file is damaged, cut short, or no file of weights; download or copy it again"
_ALONE = "save the state dict alone: torch.save(model.state_dict(), …), better: safetensors"


def read_weights(path: Path, note: Note = ignore) -> dict[str, Tensor]:
    """State dict from `.safetensors`, or from a `.pth` file without running any code in it.

    Wrappers such as `{"state_dict": …, "epoch": 3}` are taken off; names stay as they are, see `models.state.fitting`.

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
    for _ in range(_MAXWRAPPERS):
        if not isinstance(content, Mapping) or (content and all(isinstance(v, Tensor) for v in content.values())):
            break
        inner = {key: value for key, value in content.items() if isinstance(value, Mapping)}
        known = [key for key in (*WRAPPERS, *_AVERAGES) if key in inner]
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
    first, second = (bare_names({str(name): None for name in names})[-1].keys() for names in (one, other))
    return first == second


def _quoted(names: Iterable[str]) -> str:
    return listed(f"'{name}'" for name in names)


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
