"""Where each kind of data keeps its files, looked up without torch and without running anyone's code."""

from __future__ import annotations

import ast
import functools
import importlib.util
import os
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

from compress.config.data import ArraysConfig, ImageFolderConfig, TorchvisionConfig
from compress.errors import DataError, nearest
from compress.names import WEIGHTS_ENDINGS, near_path

IMAGE_EXTENSIONS = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
SPLITS = ("train", "validation", "test")
_ARCHIVES = (".gz", ".bz2", ".tar", ".tgz", ".xz", ".zip", ".part")


def no_such(kind: Literal["file", "folder", "folder or .npz file"], path: Path) -> str:
    """Message for a missing file or folder, naming the nearest of its kind that is there.

    A file is one of code, which ends in .py, or one of weights.
    """
    if kind == "file":
        near = near_path(path, (".py",) if path.suffix == ".py" else WEIGHTS_ENDINGS)
    else:
        near = near_path(path, (".npz",) if kind == "folder or .npz file" else (), folders=True)
    return f"no such {kind}: {path}{near}"


def array_name(template: str, split: str) -> str:
    """Name of one array: the template with its `{split}` filled in."""
    return template.replace("{split}", split)


def array_names(config: ArraysConfig) -> set[str]:
    """Names of all arrays in the folder or archive, without `.npy`.

    Raises:
        DataError: an archive that cannot be read.
    """
    if config.root.is_dir():
        return {path.stem for path in config.root.glob("*.npy")}
    try:
        with zipfile.ZipFile(config.root) as archive:
            return {name.removesuffix(".npy") for name in archive.namelist()}
    except (zipfile.BadZipFile, OSError) as error:
        raise DataError(f"{config.root} is not a readable .npz file: {error}") from None


def split_folders(config: ImageFolderConfig) -> dict[str, tuple[str, Path]]:
    """For each split that has its own folder and is read: the settings key that names it, and the folder."""
    folders = {"train": ("train", config.root / config.train)}
    if config.test is not None:
        folders["test"] = ("test", config.root / config.test)
    if config.given is not None and config.validation.source == "given":
        folders["validation"] = ("given", config.root / config.given)
    return folders


def class_folders(folder: Path) -> list[str]:
    """Sorted names of the folders inside `folder`; hidden ones (leading dot) are no classes.

    Raises:
        DataError: a name that is not UTF-8: class names are written into checkpoints, reports and ONNX files.
    """
    names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    for name in names:
        if any("\ud800" <= character <= "\udfff" for character in name):  # how Python reads bytes that are no UTF-8
            raise DataError(
                f"the name of the class folder {os.fsencode(name)!r} in {folder} is not UTF-8 text; rename the folder"
            )
    return names


def image_files(folder: Path) -> list[Path]:
    """All image files below `folder` at any depth, by extension, sorted; hidden files and folders are skipped."""
    found = []
    for parent, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [
            Path(parent, name) for name in names if not name.startswith(".") and name.lower().endswith(IMAGE_EXTENSIONS)
        ]
    return sorted(found)


@functools.cache
def torchvision_names() -> tuple[str, ...]:
    """All names of torchvision.datasets, read from its source: importing it would import torch."""
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return ()
    source = Path(spec.origin).with_name("datasets") / "__init__.py"
    for node in ast.parse(source.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "__all__" for t in node.targets):
            return tuple(ast.literal_eval(node.value))
    return ()


def torchvision_files(config: TorchvisionConfig) -> dict[str, int]:
    """Relative names and sizes (bytes) of the set's files under root; empty where there are none.

    They are those of the entries of root that start with the set's name, however it is cased and hyphenated
    ('cifar-10-batches-py' is CIFAR10's); where none does, as with SVHN, all files of root. Archives do not count:
    they may be deleted once they are unpacked.
    """
    if not config.root.is_dir():
        return {}
    entries = sorted(config.root.iterdir())
    own = [entry for entry in entries if _belongs(entry.name, config.name)] or entries
    return {path.relative_to(config.root).as_posix(): path.stat().st_size for path in _unpacked(own)}


def _belongs(entry: str, name: str) -> bool:
    plain, start = (re.sub(r"[^a-z0-9]", "", text.lower()) for text in (entry, name))
    follows = plain[len(start) : len(start) + 1]
    # CIFAR10 must not take CIFAR100's files.
    return plain.startswith(start) and not (start[-1:].isdigit() and follows.isdigit())


def _unpacked(entries: list[Path]) -> Iterator[Path]:
    for entry in entries:
        for path in sorted(entry.rglob("*")) if entry.is_dir() else [entry]:
            if path.is_file() and not path.name.lower().endswith(_ARCHIVES):
                yield path


def same_classes(classes: Mapping[str, list[str]]) -> str | None:
    """None where all split folders (name to class names) have train's classes, else what differs."""
    train = classes["train"]
    for split, names in classes.items():
        extra, lacking = sorted(set(names) - set(train)), sorted(set(train) - set(names))
        if extra:
            return f"the {split} folder has the class '{extra[0]}', the train folder has not{nearest(extra[0], train)}"
        if lacking:
            return f"the train folder has the class '{lacking[0]}', the {split} folder has not"
    return None
