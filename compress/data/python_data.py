"""Data from the user's own callable."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from compress.config.data import INPUT_NAMES, ONLY_INPUT, PythonConfig, is_input_name
from compress.data.arrays import Array, Named, Samples, from_arrays
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
    optionally 'classes', the class names, and 'layout' as in `kind: arrays`. Several inputs are a mapping from name to
    array or tensor, in the order in which the model takes them; 'layout' may then be a mapping with the same names.

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
    sets = {split: _samples(config, returned[split], split) for split in SPLITS if split in returned}
    names = list(sets["train"].inputs)
    for split, samples in sets.items():
        if set(samples.inputs) != set(names):
            has = listed(samples.inputs)
            raise DataError(f"{who} returned '{split}' with the inputs {has}; 'train' has {listed(names)}")
    layouts = _layouts(returned.get("layout", "auto"), names, who)
    classes = returned.get("classes")
    if classes is not None and (
        isinstance(classes, str)
        or not isinstance(classes, Sequence)
        or not all(isinstance(name, str) for name in classes)
    ):
        raise DataError(f"{who} returned classes that are not a sequence of names")
    remedy = _REMEDY if len(names) == 1 else f"{_REMEDY}, or a mapping with one for each input"
    source = from_arrays(sets, layouts, tuple(classes) if classes else None, remedy)
    return replace(source, drawn=frozenset(split for split in sets if not _is_pair(returned[split])))


def _layouts(given: Any, names: Sequence[str], who: str) -> dict[str, str]:
    """The layout of each input; 'auto' where a mapping leaves it out."""
    by_name = given if isinstance(given, Mapping) else dict.fromkeys(names, given)
    for name, layout in by_name.items():
        if name not in names:
            raise DataError(f"{who} returned a layout for '{name}'; the inputs are {listed(names)}")
        if layout not in _LAYOUTS:
            raise DataError(f"{who} returned layout {layout!r}; it must be one of {listed(_LAYOUTS)}")
    return {name: by_name.get(name, "auto") for name in names}


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


def _samples(config: PythonConfig, value: Any, split: str) -> Samples:
    who = f"data.callable: {config.callable} returned '{split}'"
    labels = f"{split} labels"
    if _is_pair(value):
        arrays = _inputs(value[0], f"{who}: inputs")
        return Samples(_called(arrays, split), Named(labels, _array(value[1], f"{who}: labels")))
    if isinstance(value, tuple | list | np.ndarray | torch.Tensor) or not hasattr(value, "__getitem__"):
        raise DataError(f"{who} as {type(value).__name__}, not a pair (inputs, labels) or a map-style dataset")
    if not hasattr(value, "__len__"):
        raise DataError(f"{who} as a dataset without a length; it must be map-style")
    arrays, numbers = _read_dataset(config, value, who)
    return Samples(_called(arrays, split), Named(labels, numbers))


def _is_pair(value: Any) -> bool:
    """Whether it is a pair of arrays, not a dataset that makes each sample when it is asked for it."""
    return isinstance(value, tuple | list) and len(value) == 2


def _called(arrays: Mapping[str, Array], split: str) -> dict[str, Named]:
    """The arrays with the names that messages call them."""
    return {
        name: Named(f"{split} inputs" if name == ONLY_INPUT else f"{split} {name}", array)
        for name, array in arrays.items()
    }


def _inputs(value: Any, what: str) -> dict[str, Array]:
    """The inputs by name, whether there is one or a mapping of them."""
    if not isinstance(value, Mapping):
        return {ONLY_INPUT: _array(value, what)}
    if not value:
        raise DataError(f"{what} must be an array, a tensor, or a mapping of them; the mapping is empty")
    for name in value:
        if not isinstance(name, str) or not is_input_name(name):
            raise DataError(f"{what} have the name {name!r}; {INPUT_NAMES}")
    return {name: _array(array, f"{what}: '{name}'") for name, array in value.items()}


def _read_dataset(config: PythonConfig, data: Any, who: str) -> tuple[dict[str, Array], Array]:
    """All samples of a map-style dataset: its inputs (n, ...) by name, and labels (n,)."""
    arrays: dict[str, Array] = {}
    labels = np.empty(len(data), dtype=np.int64)
    for index in range(len(data)):
        try:
            sample = data[index]
        except Exception as error:  # the user's dataset may raise anything
            raise _raised(config, error) from error
        if not isinstance(sample, tuple | list) or len(sample) != 2:
            raise DataError(f"{who}[{index}]: a sample must be a pair (tensor, class number)")
        found, label = _inputs(sample[0], f"{who}[{index}]: input"), sample[1]
        if getattr(label, "ndim", 0) == 0 and hasattr(label, "item"):
            label = label.item()
        if isinstance(label, bool) or not isinstance(label, int):
            raise DataError(f"{who}[{index}]: the label is {type(label).__name__}, not an integer")
        arrays = arrays or _room_for(found, len(data), who)
        if found.keys() != arrays.keys():
            raise DataError(f"{who}[{index}]: the inputs are {listed(found)}, the first sample's {listed(arrays)}")
        for name, array in arrays.items():
            one, which = found[name], "input" if name == ONLY_INPUT else f"input '{name}'"
            if one.shape != array.shape[1:] or one.dtype != array.dtype:
                expected = f"{array.dtype} {array.shape[1:]}"
                raise DataError(f"{who}[{index}]: the {which} is {one.dtype} {one.shape}, the first is {expected}")
            array[index] = one
        labels[index] = label
    if not arrays:
        raise DataError(f"{who} as an empty dataset")
    return arrays, labels


def _room_for(sample: Mapping[str, Array], n: int, who: str) -> dict[str, Array]:
    """Empty arrays for `n` samples like this one."""
    size = n * sum(array.nbytes for array in sample.values())
    if size > MAX_DATASET_BYTES:
        raise DataError(f"{who} with {size / 2**30:.1f} GB of inputs; return np.memmap arrays or use image_folder")
    return {name: np.empty((n, *array.shape), dtype=array.dtype) for name, array in sample.items()}


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
