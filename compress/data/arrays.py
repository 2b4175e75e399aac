"""Arrays of samples: read from disk, checked, and told apart by shape."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from compress.config.data import ArraysConfig
from compress.data.base import Input
from compress.data.files import SPLITS, array_name, array_names
from compress.data.memory import (
    Decode,
    MemorySource,
    Rows,
    decode_any,
    decode_nchw,
    decode_nhw,
    decode_nhwc,
    is_whole,
)
from compress.data.splits import Indices
from compress.errors import DataError

Array = npt.NDArray[Any]
_IMAGE_CHANNELS = (1, 3, 4)
_CHECK_BYTES = 1 << 26
_LAYOUTS: dict[str, Decode] = {"nhwc": decode_nhwc, "nchw": decode_nchw, "nhw": decode_nhw, "any": decode_any}


def read_arrays(config: ArraysConfig) -> MemorySource:
    """All arrays that the settings name; `.npy` files stay on disk, mapped.

    Raises:
        DataError: an array that is unreadable, pickled, or not what inputs and labels must be.
    """
    there = array_names(config)
    sets = {}
    for split in SPLITS:
        labels = array_name(config.labels, split)
        if labels in there:
            names = {name: array_name(pattern, split) for name, pattern in config.named_inputs.items()}
            arrays = {name: Named(array, _read(config, array)) for name, array in names.items()}
            sets[split] = Samples(arrays, Named(labels, _read(config, labels)))
    layouts = dict(zip(config.named_inputs, config.layouts, strict=True))
    remedy = "set data.layout to nhwc, nchw or any"
    return from_arrays(sets, layouts, config.classes, remedy if len(layouts) == 1 else f"{remedy}, as a list")


def _read(config: ArraysConfig, name: str) -> Array:
    where = config.root / f"{name}.npy" if config.root.is_dir() else config.root
    try:
        if config.root.is_dir():
            array: Array = np.load(where, mmap_mode="r", allow_pickle=False)
        else:
            with np.load(where, allow_pickle=False) as archive:
                array = archive[name]
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"data.root: array '{name}' in {where} cannot be read: {error}") from None
    return array


@dataclass(frozen=True)
class Named:
    """An array, and how messages call it."""

    name: str
    array: Array


@dataclass(frozen=True)
class Samples:
    """A set of samples: inputs (n, ...) by name, in the order in which the model takes them, and labels (n,)."""

    inputs: Mapping[str, Named]
    labels: Named


def from_arrays(
    sets: Mapping[str, Samples], layouts: Mapping[str, str], classes: tuple[str, ...] | None, remedy: str
) -> MemorySource:
    """Check sets of samples and find out how to decode them.

    Args:
        sets: 'train' and where there are such 'validation' and 'test', all with the same inputs.
        layouts: for each input 'nhwc', 'nchw', 'any' or 'auto', see `find_layout`.
        classes: names of the classes; None counts them by the largest label.
        remedy: what messages tell the user to do where the layout is unclear.

    Raises:
        DataError: lengths that differ, labels that are no classes, values that are not finite or not in [0, 1],
            shapes that are no images; names the array and the first bad index.
    """
    labels = {split: checked_labels(samples.labels.array, samples.labels.name) for split, samples in sets.items()}
    for split, samples in sets.items():
        for named in samples.inputs.values():
            have, need = len(named.array) if named.array.ndim else 0, len(labels[split])
            if have != need:
                raise DataError(f"data: '{named.name}' has {have:,} samples, '{samples.labels.name}' has {need:,}")
    names = {split: samples.labels.name for split, samples in sets.items()}
    classes = classes or _numbered(labels, names["train"])
    for split, values in labels.items():
        _check_range(values, classes, names[split])
    rows: dict[str, list[Rows]] = {split: [] for split in sets}
    for name, layout in layouts.items():
        arrays = {split: samples.inputs[name] for split, samples in sets.items()}
        for split, found in _decodable(name, arrays, layout, remedy).items():
            rows[split].append(found)
    return MemorySource(classes, labels, {split: tuple(found) for split, found in rows.items()})


def _decodable(name: str, arrays: Mapping[str, Named], layout: str, remedy: str) -> dict[str, Rows]:
    """One input of every set, checked."""
    first = arrays["train"]
    found = find_layout(first.array.shape, first.array.dtype, layout, first.name, remedy)
    for other in arrays.values():
        if other.array.shape[1:] != first.array.shape[1:] or _sort(other.array) != _sort(first.array):
            have, need = (f"{x.array.dtype} {x.array.shape[1:]}" for x in (other, first))
            raise DataError(f"data: '{other.name}' has samples {have}, '{first.name}' has {need}; they must agree")
        _check_values(other.array, other.name, is_image=found != "any", remedy=remedy)
    decode = _LAYOUTS[found]
    shape = tuple(decode(np.array(first.array[:1])).shape[1:])
    described = Input(name, shape, "int64" if found == "any" and is_whole(first.array.dtype) else "float32")
    return {split: Rows(described, x.array, decode, found != "any") for split, x in arrays.items()}


def _sort(array: Array) -> str:
    """What must agree between the sets beside the shape: how values are scaled and whether they stay whole."""
    if is_whole(array.dtype):
        return "whole"
    return "uint8" if array.dtype == np.uint8 else "float"


def find_layout(shape: tuple[int, ...], dtype: np.dtype[Any], layout: str, name: str, remedy: str) -> str:
    """How an array holds its samples: 'nhwc', 'nchw', 'nhw' (grey) or 'any' (no images, passed through).

    'auto' takes an array with four axes as images, NHWC where the last axis is 1, 3 or 4 long and NCHW where the
    second is; uint8 with three axes as grey images; floats with another number of axes, int32 and int64 are passed
    through. Where both axes or neither could be channels the user must say.

    Raises:
        DataError: the array does not fit the layout, or 'auto' cannot tell.
    """
    if dtype.kind not in "fiub" or dtype == np.longdouble:
        raise DataError(f"data: '{name}' holds {dtype}; inputs must be numbers, such as uint8, float32 or int64")
    if layout == "any":
        return "any"
    if layout == "auto" and (is_whole(dtype) or (dtype.kind == "f" and len(shape) != 4)):
        return "any"
    if dtype != np.uint8 and dtype.kind != "f":
        raise DataError(f"data: '{name}' holds {dtype}; images must be uint8, or floats in [0, 1]; {remedy}")
    if len(shape) == 3:
        return "nhw"
    if len(shape) != 4:
        raise DataError(f"data: '{name}' of shape {shape} holds no images; {remedy}")
    if layout != "auto":
        return layout
    last, second = shape[3] in _IMAGE_CHANNELS, shape[1] in _IMAGE_CHANNELS
    if last == second:
        which = "both the second and the last axis" if last else "neither the second nor the last axis"
        raise DataError(f"data: '{name}' of shape {shape}: {which} could be the channels (1, 3 or 4); {remedy}")
    return "nhwc" if last else "nchw"


def checked_labels(labels: Array, name: str) -> Indices:
    """Labels as int64, shape (n,).

    Raises:
        DataError: labels that are no integers from 0 along one axis, or none at all.
    """
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise DataError(
            f"data: '{name}' is {labels.dtype} of shape {labels.shape}; labels must be integers of shape (n,)"
        )
    if not len(labels):
        raise DataError(f"data: '{name}' is empty")
    values = labels.astype(np.int64)
    bad = np.flatnonzero(values < 0)
    if bad.size:
        raise DataError(f"data: '{name}'[{bad[0]}] is {labels[bad[0]]}; labels are integers from 0")
    return values


def _check_range(values: Indices, classes: tuple[str, ...], name: str) -> None:
    bad = np.flatnonzero(values >= len(classes))
    if bad.size:
        n = len(classes)
        raise DataError(f"data: '{name}'[{bad[0]}] is {values[bad[0]]}; with {n} classes labels are 0 to {n - 1}")


def _numbered(labels: Mapping[str, Indices], name: str) -> tuple[str, ...]:
    """'0', '1', … up to the largest label, each of which must occur: labels counted from 1 must not go unseen."""
    count = 1 + max(int(values.max()) for values in labels.values())
    # Labels that are row numbers or hashes would ask for a huge list of classes.
    seen = np.unique(np.concatenate(list(labels.values())))
    if len(seen) < count:
        gap = next(i for i, label in enumerate([*seen, -1]) if i != label)
        raise DataError(
            f"data: labels in '{name}' go up to {count - 1} but {gap} never occurs; labels count from 0; "
            "name all classes (`classes`) if one has no samples"
        )
    return tuple(str(i) for i in range(count))


def _check_values(inputs: Array, name: str, *, is_image: bool, remedy: str) -> None:
    """Floats must be finite, and in [0, 1] where they are images; read piece by piece, for files larger than memory."""
    if inputs.dtype.kind != "f":
        return
    rows = max(1, _CHECK_BYTES // max(1, inputs.itemsize * int(np.prod(inputs.shape[1:]))))
    for start in range(0, len(inputs), rows):
        piece = inputs[start : start + rows].reshape(-1, int(np.prod(inputs.shape[1:])))
        bad = np.flatnonzero(~np.isfinite(piece).all(axis=1))
        if bad.size:
            raise DataError(f"data: '{name}'[{start + bad[0]}] holds a value that is not finite")
        if not is_image:
            continue
        low, high = piece.min(axis=1), piece.max(axis=1)
        bad = np.flatnonzero((low < 0) | (high > 1))
        if bad.size:
            at = bad[0]
            raise DataError(
                f"data: '{name}'[{start + at}] holds values from {low[at]:.4g} to {high[at]:.4g}; images are uint8 "
                f"or floats in [0, 1], normalising is done by data.normalize; for other inputs {remedy}"
            )
