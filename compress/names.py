"""What the names in settings mean: built-in factories, the user's code, files of weights. Imports none of it."""

from __future__ import annotations

import importlib.util
import os
from importlib.machinery import PathFinder
from pathlib import Path

from compress.errors import closest

WEIGHTS_ENDINGS = (".safetensors", ".pth", ".pt", ".th", ".bin", ".ckpt", ".tar")
"""What the name of a file of weights ends in."""
BUILT_IN = ("cifar", "classic", "torchvision", "timm")
"""Schemes of factories that are no user's code."""
WITH_PUBLISHED_WEIGHTS = ("torchvision", "timm")
"""Those that fetch weights by name."""


def is_code(factory: str) -> bool:
    """Whether calling a factory runs somebody's code rather than a built-in one."""
    return factory.rpartition(":")[0] not in BUILT_IN  # split where the factory is resolved


def placeless(factory: str) -> str:
    """A factory's name without the folders of a user's file: 'net.py:make' for '/home/me/net.py:make'."""
    place, _, name = factory.rpartition(":")
    return f"{place.replace(chr(92), '/').rsplit('/', 1)[-1]}:{name}"


def is_weights_file(weights: str) -> bool:
    """Whether a `weights` setting names a file rather than published weights."""
    return weights.endswith(WEIGHTS_ENDINGS) or "/" in weights or os.sep in weights


def near_path(path: Path, endings: tuple[str, ...] = ("",), *, folders: bool = False) -> str:
    """`"; did you mean 'x'?"` for a file or folder that is not there, or `""` where nothing is close.

    Each part that is missing is looked for by its nearest name, so that a slip in a folder's name is found as well. The
    answer is the name alone where only that differs, else the whole path.

    Args:
        path: what is not there.
        endings: endings of the files to suggest; none for no file at all.
        folders: whether to suggest folders, whatever their names end in.
    """
    there, parts = path, list[str]()
    while not os.path.isdir(there) and there != there.parent:  # noqa: PTH112  # Path's raises on names too long
        there, parts = there.parent, [there.name, *parts]
    for position, part in enumerate(parts):
        try:
            names = sorted(os.listdir(there))  # noqa: PTH208
        except OSError:
            return ""
        is_last = position == len(parts) - 1
        names = [
            name
            for name in names
            if (folders or not is_last if os.path.isdir(there / name) else is_last and name.endswith(endings))  # noqa: PTH112
        ]
        # By stem: a common ending makes any two short names look alike.
        stem = closest(Path(part).stem, [Path(name).stem for name in names])
        alike = sorted((Path(name).suffix != Path(part).suffix, name) for name in names if Path(name).stem == stem)
        if not alike:
            return ""
        there /= part if part in names else alike[0][1]
    if not parts or not os.path.exists(there):  # noqa: PTH110
        return ""
    return f"; did you mean '{there.name if there.parent == path.parent else there}'?"


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
