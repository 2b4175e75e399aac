"""Data from the user's own callable."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from compress.config.data import PythonConfig
from compress.data.arrays import Array, from_arrays
from compress.data.files import SPLITS
from compress.data.memory import MemorySource
from compress.errors import DataError, listed, nearest

MAX_DATASET_BYTES = 4 << 30
_KEYS = (*SPLITS, "classes", "layout")
_LAYOUTS = ("auto", "nhwc", "nchw", "any")
_REMEDY = "return 'layout': 'nhwc', 'nchw' or 'any' beside the splits"


def read_python(config: PythonConfig) -> MemorySource:
    """Call the user's callable and check what it returns.

    It returns a mapping with 'train' and optionally 'validation' and 'test', each a pair (inputs, labels) of arrays or
    tensors (mapped arrays stay mapped) or a map-style dataset of (tensor, int), which is read once into memory; and
    optionally 'classes', the class names, and 'layout' as in `kind: arrays`.

    Raises:
        DataError: the callable is not there, raises, or returns something else; names it.
    """
    function = _resolve(config.callable)
    try:
        returned = function(**config.kwargs)
    except Exception as error:  # the user's code may raise anything
        raise _raised(config, error) from error
    who = f"data.callable: {config.callable}"
    if not isinstance(returned, Mapping):
        raise DataError(f"{who} returned {type(returned).__name__}, not a mapping with 'train'")
    for key in returned:
        if key not in _KEYS:
            raise DataError(
                f"{who} returned the unknown key '{key}' (allowed: {listed(_KEYS)}){nearest(str(key), _KEYS)}"
            )
    if "train" not in returned:
        raise DataError(f"{who} returned no 'train'")
    layout = returned.get("layout", "auto")
    if layout not in _LAYOUTS:
        raise DataError(f"{who} returned layout {layout!r}; it must be one of {listed(_LAYOUTS)}")
    sets = {split: _pair(config, returned[split], split) for split in SPLITS if split in returned}
    names = {split: (f"{split} inputs", f"{split} labels") for split in sets}
    classes = returned.get("classes")
    if classes is not None and (
        isinstance(classes, str)
        or not isinstance(classes, Sequence)
        or not all(isinstance(name, str) for name in classes)
    ):
        raise DataError(f"{who} returned classes that are not a sequence of names")
    return from_arrays(sets, names, layout, tuple(classes) if classes else None, _REMEDY)


def _resolve(name: str) -> Callable[..., Any]:
    target, _, attribute = name.rpartition(":")
    try:
        module = _from_file(Path(target)) if target.endswith(".py") else importlib.import_module(target)
    except Exception as error:  # the user's module may raise anything
        at = _place(error)
        raise DataError(f"data.callable: {target} cannot be imported: {type(error).__name__}: {error}{at}") from error
    function = getattr(module, attribute, None)
    if not callable(function):
        raise DataError(f"data.callable: {target} has no callable '{attribute}'{nearest(attribute, dir(module))}")
    found: Callable[..., Any] = function
    return found


def _from_file(path: Path) -> Any:
    # The name is free of dots and unlike any other, so that it hides no module of the same file name.
    name = f"compress_data_{hashlib.sha256(str(path).encode()).hexdigest()[:12]}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickling look there
    spec.loader.exec_module(module)
    return module


def _raised(config: PythonConfig, error: Exception) -> DataError:
    return DataError(f"data.callable: {config.callable} raised {type(error).__name__}: {error}{_place(error)}")


def _place(error: Exception) -> str:
    """Where in the user's code, or below it, the error was raised."""
    frames = list(traceback.extract_tb(error.__traceback__))
    frames = [frame for frame in frames if frame.filename != __file__ and not frame.filename.startswith("<")]
    return f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""


def _pair(config: PythonConfig, value: Any, split: str) -> tuple[Array, Array]:
    who = f"data.callable: {config.callable} returned '{split}'"
    if isinstance(value, tuple | list) and len(value) == 2:
        return _array(value[0], f"{who}: inputs"), _array(value[1], f"{who}: labels")
    if isinstance(value, tuple | list | np.ndarray | torch.Tensor) or not hasattr(value, "__getitem__"):
        raise DataError(f"{who} as {type(value).__name__}, not a pair (inputs, labels) or a map-style dataset")
    if not hasattr(value, "__len__"):
        raise DataError(f"{who} as a dataset without a length; it must be map-style")
    return _read_dataset(config, value, who)


def _read_dataset(config: PythonConfig, data: Any, who: str) -> tuple[Array, Array]:
    """All samples of a map-style dataset, inputs (n, ...) and labels (n,)."""
    inputs: Array | None = None
    labels = np.empty(len(data), dtype=np.int64)
    for index in range(len(data)):
        try:
            sample = data[index]
        except Exception as error:  # the user's dataset may raise anything
            raise _raised(config, error) from error
        if not isinstance(sample, tuple | list) or len(sample) != 2:
            raise DataError(f"{who}[{index}]: a sample must be a pair (tensor, class number)")
        found, label = _array(sample[0], f"{who}[{index}]: input"), sample[1]
        if getattr(label, "ndim", 0) == 0 and hasattr(label, "item"):
            label = label.item()
        if isinstance(label, bool) or not isinstance(label, int):
            raise DataError(f"{who}[{index}]: the label is {type(label).__name__}, not an integer")
        if inputs is None:
            if len(data) * found.nbytes > MAX_DATASET_BYTES:
                size = len(data) * found.nbytes / 2**30
                raise DataError(f"{who} with {size:.1f} GB of inputs; return np.memmap arrays or use image_folder")
            inputs = np.empty((len(data), *found.shape), dtype=found.dtype)
        if found.shape != inputs.shape[1:] or found.dtype != inputs.dtype:
            expected = f"{inputs.dtype} {inputs.shape[1:]}"
            raise DataError(f"{who}[{index}]: the input is {found.dtype} {found.shape}, the first is {expected}")
        inputs[index], labels[index] = found, label
    if inputs is None:
        raise DataError(f"{who} as an empty dataset")
    return inputs, labels


def _array(value: Any, what: str) -> Array:
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        value = value.float().numpy() if value.dtype is torch.bfloat16 else value.numpy()
    try:
        array: Array | None = np.asarray(value) if isinstance(value, np.ndarray | list | tuple) else None
    except ValueError:  # lists of different lengths
        array = None
    if array is None or array.dtype == object:
        raise DataError(f"{what} must be an array or a tensor, got {type(value).__name__}")
    return array
