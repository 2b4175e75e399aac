"""What the names in settings mean: built-in factories, the user's code, files of weights. Imports none of it."""

from __future__ import annotations

import importlib.util
import os
from importlib.machinery import PathFinder
from pathlib import Path

BUILT_IN = ("cifar", "torchvision", "timm")
"""Schemes of factories that are no user's code."""


def is_code(factory: str) -> bool:
    """Whether calling a factory runs somebody's code rather than a built-in one."""
    return factory.rpartition(":")[0] not in BUILT_IN  # split where the factory is resolved


def placeless(factory: str) -> str:
    """A factory's name without the folders of a user's file: 'net.py:make' for '/home/me/net.py:make'."""
    place, _, name = factory.rpartition(":")
    return f"{place.replace(chr(92), '/').rsplit('/', 1)[-1]}:{name}"


def is_weights_file(weights: str) -> bool:
    """Whether a `weights` setting names a file rather than published weights."""
    endings = (".safetensors", ".pth", ".pt", ".th", ".bin", ".ckpt", ".tar")
    return weights.endswith(endings) or "/" in weights or os.sep in weights


def callable_file(callable_name: str) -> Path | None:
    """Source file of `file.py:function` or `package.module:function`; None where there is no such module.

    Neither the module nor its parent packages are imported.
    """
    target = callable_name.rpartition(":")[0]
    if target.endswith(".py"):
        return Path(target)
    first, *rest = target.split(".")
    try:
        spec = importlib.util.find_spec(first)
    except (ImportError, ValueError):
        return None
    name = first
    for part in rest:
        if spec is None or spec.submodule_search_locations is None:
            return None
        name = f"{name}.{part}"
        spec = PathFinder.find_spec(name, list(spec.submodule_search_locations))
    return Path(spec.origin) if spec is not None and spec.has_location and spec.origin else None
