"""What identifies a data set, for cache keys, and what is missing of it; needs no torch."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

from pydantic import JsonValue

from compress.config.data import (
    AnyDataConfig,
    ArraysConfig,
    ImageFolderConfig,
    PythonConfig,
    TorchvisionConfig,
)
from compress.data.files import (
    SPLITS,
    array_name,
    array_names,
    class_folders,
    image_files,
    no_such,
    same_classes,
    split_folders,
    torchvision_files,
    torchvision_names,
)
from compress.errors import DataError, Problem, listed, nearest
from compress.machine import version
from compress.names import callable_file

# Where the data lies, and what changes how fast it is read but no bit of it.
_NOT_IDENTITY = frozenset({"root", "callable", "workers", "download"})


def fingerprint(config: AnyDataConfig) -> dict[str, JsonValue]:
    """Everything that identifies the data: its settings and its content, no absolute path, JSON-able.

    What stands for the content:
        digits: the version of scikit-learn.
        arrays: SHA-256 of each array file.
        image_folder: SHA-256 over the sorted relative names, sizes and modification times of the images, and their
            number; the images themselves are not read.
        torchvision: its version, and the names and sizes of the unpacked files, None before they are downloaded.
            With `download: true`, load the data before taking the fingerprint, or the first run's differs.
        python: SHA-256 of the file the callable stands in; files which that code reads or imports are not seen.

    Raises:
        DataError: files are missing or unreadable; names the key and the path.
    """
    problems = missing(config)
    if problems:
        raise DataError("\n".join(str(problem) for problem in problems))
    settings: JsonValue = config.model_dump(mode="json", by_alias=True, exclude=set(_NOT_IDENTITY))
    try:
        return {"settings": settings, "content": _content(config)}
    except OSError as error:
        raise DataError(f"data: {error.filename} cannot be read: {error.strerror}") from None


def missing(config: AnyDataConfig) -> list[Problem]:
    """Files, folders, arrays and names that the settings ask for and that are not there; empty where all are.

    Looks at names only: it reads no data and imports no code.
    """
    try:
        return list(_missing(config))
    except OSError as error:
        return [_problem("root", f"{error.filename} cannot be read: {error.strerror}")]


def _content(config: AnyDataConfig) -> dict[str, JsonValue]:
    if isinstance(config, ArraysConfig):
        return {name: _sha256(path) for name, path in _array_files(config).items()}
    if isinstance(config, ImageFolderConfig):
        return _images(config)
    if isinstance(config, TorchvisionConfig):
        files = torchvision_files(config)
        return {"torchvision": version("torchvision"), "files": dict(files) or None}
    if isinstance(config, PythonConfig):
        source = callable_file(config.callable)
        assert source is not None  # `missing` would have said so
        target, _, function = config.callable.rpartition(":")
        module = "" if target.endswith(".py") else target
        return {"module": module, "function": function, "source": _sha256(source)}
    return {"scikit-learn": version("scikit-learn")}


def _array_files(config: ArraysConfig) -> dict[str, Path]:
    if config.root.is_file():
        return {"archive": config.root}
    templates = (*config.named_inputs.values(), config.labels)
    names = [array_name(template, split) for split in SPLITS for template in templates]
    there = array_names(config)
    return {name: config.root / f"{name}.npy" for name in names if name in there}


def _images(config: ImageFolderConfig) -> dict[str, JsonValue]:
    digest, count = hashlib.sha256(), 0
    for split, (_, folder) in sorted(split_folders(config).items()):
        for path in image_files(folder):
            stat = path.stat()
            name = f"{split}/{path.relative_to(folder).as_posix()}"
            digest.update(f"{name}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode(errors="surrogateescape"))
            count += 1
    return {"files": count, "names_sizes_times": digest.hexdigest()}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _problem(key: str, message: str) -> Problem:
    return Problem("", f"data.{key}", message)


def _missing(config: AnyDataConfig) -> Iterator[Problem]:
    if isinstance(config, ArraysConfig):
        yield from _missing_arrays(config)
    elif isinstance(config, ImageFolderConfig):
        yield from _missing_folders(config)
    elif isinstance(config, TorchvisionConfig):
        names = torchvision_names()
        if names and config.name not in names:
            yield _problem("name", f"torchvision.datasets has no '{config.name}'{nearest(config.name, names)}")
        if not config.download and not config.root.is_dir():
            yield _problem("root", f"{no_such('folder', config.root)}; `download: true` fetches the files")
    elif isinstance(config, PythonConfig):
        source = callable_file(config.callable)
        if source is None:
            module = config.callable.rpartition(":")[0]
            yield _problem("callable", f"no module '{module}' with a source file; a file is named path/to/file.py:name")
        elif not source.is_file():
            yield _problem("callable", no_such("file", source))


def _missing_arrays(config: ArraysConfig) -> Iterator[Problem]:
    if not config.root.exists():
        yield _problem("root", no_such("folder or .npz file", config.root))
        return
    templates = _array_templates(config)
    for key, template in templates.items():
        if "{split}" not in template:
            yield _problem(key, f"must contain {{split}}, got '{template}': every split would be the same array")
            return
    try:
        there = array_names(config)
    except DataError as error:
        yield _problem("root", str(error))
        return
    needed = {"train", "validation"} if config.validation.source == "given" else {"train"}
    for split in SPLITS:
        names = {key: array_name(template, split) for key, template in templates.items()}
        if split not in needed and not there & set(names.values()):
            continue
        for key, name in names.items():
            if name not in there:
                has = f"it has {listed(sorted(there))}" if there else "it has no .npy array"
                yield _problem(key, f"no array '{name}' in {config.root} ({has}){nearest(name, sorted(there))}")


def _array_templates(config: ArraysConfig) -> dict[str, str]:
    """Templates of array names, by the settings key that gives them."""
    if isinstance(config.inputs, str):
        return {"inputs": config.inputs, "labels": config.labels}
    return {**{f"inputs.{i}": template for i, template in enumerate(config.inputs)}, "labels": config.labels}


def _missing_folders(config: ImageFolderConfig) -> Iterator[Problem]:
    if not config.root.is_dir():
        yield _problem("root", no_such("folder", config.root))
        return
    if config.validation.source == "given" and config.given is None:
        yield _problem("given", "must name the folder of validation images for `validation: {from: given}`")
    classes = {}
    for split, (key, folder) in split_folders(config).items():
        if not folder.is_dir():
            yield _problem(key, no_such("folder", folder))
            continue
        try:
            classes[split] = class_folders(folder)
        except DataError as error:
            yield _problem(key, str(error))
            continue
        if not classes[split]:
            example = folder / "cat" / "1.jpg"
            yield _problem(
                key, f"{folder} has no class folders; images belong in one folder per class, as in {example}"
            )
            del classes[split]
    differs = same_classes(classes) if "train" in classes else None
    if differs:
        yield _problem("root", f"{config.root}: {differs}")
