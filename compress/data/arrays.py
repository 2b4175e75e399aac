"""Arrays of samples: read from disk, checked, and told apart by shape."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from compress.config.data import ArraysConfig
from compress.data.files import SPLITS, array_name, array_names
from compress.data.memory import Decode, MemorySource, decode_any, decode_nchw, decode_nhw, decode_nhwc
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
        names = array_name(config.inputs, split), array_name(config.labels, split)
        if names[0] in there:
            sets[split] = (_read(config, names[0]), _read(config, names[1]))
    named = {split: (array_name(config.inputs, split), array_name(config.labels, split)) for split in sets}
    return from_arrays(sets, named, config.layout, config.classes, "set data.layout to nhwc, nchw or any")


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


def from_arrays(
    sets: Mapping[str, tuple[Array, Array]],
    names: Mapping[str, tuple[str, str]],
    layout: str,
    classes: tuple[str, ...] | None,
    remedy: str,
) -> MemorySource:
    """Check sets of (inputs, labels) and find out how to decode them.

    Args:
        sets: 'train' and where there are such 'validation' and 'test': inputs (n, ...) and integer labels (n,).
        names: how messages call the two arrays of each set.
        layout: 'nhwc', 'nchw', 'any' or 'auto', see `find_layout`.
        classes: names of the classes; None counts them by the largest label.
        remedy: what messages tell the user to do where the layout is unclear.

    Raises:
        DataError: lengths that differ, labels that are no classes, values that are not finite or not in [0, 1],
            shapes that are no images; names the array and the first bad index.
    """
    labels = {split: checked_labels(pair[1], names[split][1]) for split, pair in sets.items()}
    for split, (inputs, _) in sets.items():
        if inputs.ndim == 0 or len(inputs) != len(labels[split]):
            have, need = inputs.shape[0] if inputs.ndim else 0, len(labels[split])
            raise DataError(f"data: '{names[split][0]}' has {have:,} samples, '{names[split][1]}' has {need:,}")
    classes = classes or _numbered(labels, names)
    for split, values in labels.items():
        _check_range(values, classes, names[split][1])
    first, first_name = sets["train"][0], names["train"][0]
    found = find_layout(first.shape, first.dtype, layout, first_name, remedy)
    for split, (inputs, _) in sets.items():
        if inputs.shape[1:] != first.shape[1:] or (inputs.dtype == np.uint8) != (first.dtype == np.uint8):
            one, other = f"{inputs.dtype} {inputs.shape[1:]}", f"{first.dtype} {first.shape[1:]}"
            raise DataError(f"data: '{names[split][0]}' has samples {one}, '{first_name}' has {other}; they must agree")
        _check_values(inputs, names[split][0], is_image=found != "any", remedy=remedy)
    rows = {split: pair[0] for split, pair in sets.items()}
    shape = tuple(_LAYOUTS[found](np.array(first[:1])).shape[1:])
    return MemorySource(classes, labels, rows, _LAYOUTS[found], shape, is_image=found != "any")


def find_layout(shape: tuple[int, ...], dtype: np.dtype[Any], layout: str, name: str, remedy: str) -> str:
    """How an array holds its samples: 'nhwc', 'nchw', 'nhw' (grey) or 'any' (no images, passed through).

    'auto' takes an array with four axes as images, NHWC where the last axis is 1, 3 or 4 long and NCHW where the
    second is; uint8 with three axes as grey images; floats with another number of axes are passed through. Where both
    axes or neither could be channels the user must say.

    Raises:
        DataError: the array does not fit the layout, or 'auto' cannot tell.
    """
    if dtype.kind not in "fiub" or dtype == np.longdouble:
        raise DataError(f"data: '{name}' holds {dtype}; inputs must be uint8 or float32")
    if layout == "any":
        return "any"
    if layout == "auto" and dtype.kind == "f" and len(shape) != 4:
        return "any"
    if dtype != np.uint8 and dtype.kind != "f":
        raise DataError(f"data: '{name}' holds {dtype}; images must be uint8, or floats in [0, 1]")
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


def _numbered(labels: Mapping[str, Indices], names: Mapping[str, tuple[str, str]]) -> tuple[str, ...]:
    """'0', '1', … up to the largest label, each of which must occur: labels counted from 1 must not go unseen."""
    count = 1 + max(int(values.max()) for values in labels.values())
    # Labels that are row numbers or hashes would ask for a huge list of classes.
    seen = np.unique(np.concatenate(list(labels.values())))
    if len(seen) < count:
        gap = next(i for i, label in enumerate([*seen, -1]) if i != label)
        name = names["train"][1]
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
