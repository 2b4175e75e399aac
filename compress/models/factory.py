"""From a factory name to a model: built-in names, and the user's own code where it is trusted."""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn

from compress.errors import CheckpointError, ModelError, listed, nearest
from compress.models import cifar, classic
from compress.names import BUILT_IN, is_code, near_path

_OWN: Mapping[str, Mapping[str, Callable[..., nn.Module]]] = {"cifar": cifar.MODELS, "classic": classic.MODELS}
"""Our own networks, by scheme."""
# Arguments of built-in factories that fetch or read files; a checkpoint from a stranger must not set them.
_READS_FILES = (
    "weights",
    "weights_backbone",
    "pretrained",
    "pretrained_cfg",
    "pretrained_cfg_overlay",
    "checkpoint_path",
)


@dataclass(frozen=True)
class Arch:
    """An architecture as data: the factory's name and its arguments."""

    factory: str
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def is_code(self) -> bool:
        """Whether making this model runs somebody's code rather than a built-in factory."""
        return is_code(self.factory)

    def reads_files(self) -> str | None:
        """The first argument that makes a built-in factory fetch or read files, None where there is none."""
        return None if self.is_code() else next((name for name in sorted(self.kwargs) if name in _READS_FILES), None)


def create(arch: Arch, *, seed: int) -> nn.Module:
    """A freshly initialised model on the CPU; the same seed gives the same weights.

    Raises:
        ModelError: where the factory does not exist, refuses its arguments or returns no module.
    """
    if bad := arch.reads_files():
        raise ModelError(f"model.kwargs: '{bad}' fetches or reads weights; name them in model.weights instead")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _call(arch)


def create_empty(arch: Arch, *, trusted: Collection[str]) -> nn.Module:
    """The model with parameters on meta and real buffers, to be filled from a checkpoint.

    Args:
        arch: the architecture, perhaps out of a stranger's checkpoint.
        trusted: factory names that may run code; built-in names need no trust.

    Raises:
        CheckpointError: where the architecture needs code that is not trusted.
        ModelError: as `create`.
    """
    if arch.is_code() and arch.factory not in trusted:
        raise CheckpointError(
            f"the checkpoint's model is made by '{arch.factory}', which is code; it is not run unless you say so "
            "(--trust-code), because a checkpoint may come from a stranger"
        )
    if bad := arch.reads_files():
        raise CheckpointError(f"the checkpoint's model has the argument '{bad}', which may fetch or read files")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            # Buffers stay real: those that are not saved would otherwise be lost.
            with init_empty_weights(include_buffers=False):
                return _call(arch)
        except ModelError:
            # Some constructors compute with their parameters, which meta tensors cannot.
            return _call(arch)


def _call(arch: Arch) -> nn.Module:
    builder = resolve(arch.factory)
    try:
        model = builder(**arch.kwargs)
    except TypeError as error:
        accepted = _accepted(builder)
        wrong = next((name for name in arch.kwargs if accepted and name not in accepted), None)
        hint = f" (it takes {', '.join(accepted)}){nearest(wrong, accepted)}" if wrong else ""
        raise ModelError(f"model: '{arch.factory}' refuses its kwargs: {error}{hint}") from error
    except Exception as error:  # a factory may raise anything
        reason = f"{type(error).__name__}: {error}"
        raise ModelError(f"model: '{arch.factory}' fails with kwargs {dict(arch.kwargs)}: {reason}") from error
    if not isinstance(model, nn.Module):
        raise ModelError(f"model: '{arch.factory}' returns a {type(model).__name__}, not a torch.nn.Module")
    return model


def _accepted(builder: Callable[..., Any]) -> list[str]:
    """Names of the arguments, none where they cannot be told because some are handed on."""
    try:
        parameters = inspect.signature(builder).parameters.values()
    except (TypeError, ValueError):
        return []
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
        return []
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [parameter.name for parameter in parameters if parameter.kind in named]


def resolve(factory: str) -> Callable[..., nn.Module]:
    """The callable behind a factory name.

    Raises:
        ModelError: naming what does not exist, and the nearest name that does.
    """
    scheme, colon, name = factory.rpartition(":")
    if not colon or not scheme or not name:
        raise ModelError(
            f"model.factory: must look like 'cifar:resnet56', 'package.module:callable' or 'file.py:callable', got '{factory}'"
        )
    if scheme in _OWN:
        return _named(name, _OWN[scheme], factory)
    if scheme == "torchvision":
        from torchvision import models

        names = models.list_models(module=models)
        return functools.partial(_named(name, {n: models.get_model_builder(n) for n in names}, factory), weights=None)
    if scheme == "timm":
        return _timm(name, factory)
    return _user_callable(scheme, name, factory)


def _named(name: str, table: Mapping[str, Callable[..., nn.Module]], factory: str) -> Callable[..., nn.Module]:
    if name not in table:
        near = nearest(name, table) or f"; there are {listed(table)}"
        raise ModelError(f"model.factory: there is no '{factory}'{near}")
    return table[name]


def _timm(name: str, factory: str) -> Callable[..., nn.Module]:
    try:
        import timm
    except ModuleNotFoundError:
        raise ModelError(f"model.factory: '{factory}' needs timm: pip install 'compress[timm]'") from None
    names = timm.list_models()
    if name not in names:
        raise ModelError(f"model.factory: there is no '{factory}'{nearest(name, names)}")
    return functools.partial(timm.create_model, name, pretrained=False)


def _user_callable(place: str, name: str, factory: str) -> Callable[..., nn.Module]:
    module = _module_from_file(Path(place), factory) if place.endswith(".py") else _module_by_name(place, factory)
    found = getattr(module, name, None)
    if not callable(found):
        public = [n for n in dir(module) if not n.startswith("_") and callable(getattr(module, n))]
        near = nearest(name, public) or (f"; it has {listed(public)}" if public else "")
        raise ModelError(f"model.factory: {place} has no callable '{name}'{near}")
    return found  # type: ignore[no-any-return]  # whether it returns a module is checked when it does


def _module_by_name(place: str, factory: str) -> Any:
    try:
        return importlib.import_module(place)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{place}.".startswith(f"{error.name}."):  # one that the user's module wants
            raise ModelError(f"model.factory: '{factory}': {place} needs a module that is not here: {error}") from error
        near = nearest(place, (*BUILT_IN, *(path.stem for path in Path.cwd().glob("*.py"))))
        remedy = near or "; a file is named path/to/file.py:callable"
        raise ModelError(f"model.factory: '{factory}': {error}{remedy}") from error
    except Exception as error:  # the user's module may raise anything
        raise ModelError(f"model.factory: {place}: {type(error).__name__}: {error}") from error


def _module_from_file(path: Path, factory: str) -> Any:
    # Free of dots and unlike any other, so that it hides no module of the same file name.
    name = f"compress_model_{hashlib.sha256(str(path).encode()).hexdigest()[:12]}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise ModelError(f"model.factory: '{factory}': no such file{near_path(path, ('.py',))}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickling look there
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # the user's file may raise anything
        raise ModelError(f"model.factory: {path}: {type(error).__name__}: {error}") from error
    return module
