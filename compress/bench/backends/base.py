"""What a backend is to the process that measures it: a way to load a model, and calls that tell how long they took.

A backend is a module with `prepare`, which imports what it needs and refuses where it cannot run, and `load`. This module
imports numpy only: the process of one backend must not carry the libraries of another.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

Feed = dict[str, NDArray[Any]]
"""A batch by the names of the model's inputs, in their order."""
Call = Callable[[], int]
"""Runs the model once, to the end, and answers how many nanoseconds that took."""

MODULES: Final[Mapping[str, str]] = {
    "onnxruntime": "compress.bench.backends.onnx_runtime",
    "torch": "compress.bench.backends.pytorch",
    "torch-compile": "compress.bench.backends.pytorch",
    "openvino": "compress.bench.backends.open_vino",
    "tensorrt": "compress.bench.backends.onnx_runtime",
}
"""Backends, and the module of each; named, not imported, because a process needs one of them."""

_FLOATS = frozenset({"float16", "float32", "float64"})
_COUNTS = frozenset({"int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "bool"})


class UnavailableError(Exception):
    """The backend or the device is not there; the text says why in one line. No model can change that."""


@dataclass(frozen=True)
class Task:
    """All that a process must know to measure one variant in one setting."""

    backend: str
    device: str
    compute: str
    precision: str
    """Of the file."""
    path: str
    """The ONNX file."""
    checkpoint: str | None
    trusted: tuple[str, ...]
    batch_size: int
    threads: int
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """By name of an input, its sizes without the batch, where the file leaves them open."""
    import_paths: tuple[str, ...] = ()
    """Where the parent looks for modules: code of the user's may lie there."""


@dataclass(frozen=True)
class Given:
    """One input of a model."""

    name: str
    shape: tuple[int | str | None, ...]
    """The batch first; what is no number is open."""
    dtype: str
    """As numpy calls it, or, where numpy has no such type, as the backend does."""


class Model(Protocol):
    """A model that is loaded."""

    @property
    def provider(self) -> str:
        """What of the backend runs it."""

    @property
    def precision(self) -> str:
        """What it computes in: 'fp32', 'int8', 'fp16' or 'bf16'."""

    @property
    def inputs(self) -> Sequence[Given]:
        """What it takes."""

    def bind(self, feed: Feed) -> Call:
        """What runs it on this batch, again and again; the batch is brought to the device before."""


class Backend(Protocol):
    """A module of `MODULES`."""

    def prepare(self, task: Task) -> None:
        """Import what loading needs, and set the number of threads.

        Raises:
            UnavailableError: where the backend or the device is not there.
        """

    def load(self, task: Task) -> Model:
        """Read the model and make it ready; whatever it raises is the reason why there is no row."""


def closed_shapes(
    inputs: Sequence[Given], batch_size: int, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[int, ...]]:
    """The shape of every input with nothing left open, the batch first.

    Args:
        inputs: What the model takes.
        batch_size: Fills the first size of each.
        shapes: Sizes without the batch, by name, of inputs that leave them open; those of others may be repeated.

    Raises:
        ValueError: where the model has no input of a name, or sizes are missing, too many or not those of the model; it
            says what is expected.
    """
    names = [value.name for value in inputs]
    for name in shapes:
        if name not in names:
            raise ValueError(f"no input is called '{name}'; the model takes {', '.join(map(repr, names))}")
    return {value.name: _closed(value, batch_size, shapes.get(value.name)) for value in inputs}


def _closed(value: Given, batch_size: int, sizes: tuple[int, ...] | None) -> tuple[int, ...]:
    if not value.shape:
        raise ValueError(f"input '{value.name}' must have the batch as its first dimension, its shape is []")
    batch, *rest = value.shape
    if isinstance(batch, int) and batch != batch_size:
        raise ValueError(
            f"the file only takes batch size {batch}; use --batch-size {batch} (in a pipeline bench.latency.batch_sizes)"
        )
    if sizes is None:
        closed = tuple(size for size in rest if isinstance(size, int))
        if len(closed) < len(rest):
            example = "x".join(str(size) if isinstance(size, int) else "224" for size in rest)
            raise ValueError(
                f"input '{value.name}' leaves more than the batch open, its shape is {list(value.shape)}: "
                f"give --shape {value.name}={example}, or whatever sizes it is for"
            )
        return (batch_size, *closed)
    fits = len(sizes) == len(rest) and all(
        size > 0 and (not isinstance(wanted, int) or size == wanted) for size, wanted in zip(sizes, rest, strict=True)
    )
    if not fits:
        wanted = "x".join(str(size) if isinstance(size, int) else "?" for size in rest)
        raise ValueError(
            f"input '{value.name}' cannot have the shape {'x'.join(map(str, sizes))}: without the batch it must be "
            f"{wanted or 'empty'}" + (", with any size from 1 in the place of '?'" if "?" in wanted else "")
        )
    return (batch_size, *sizes)


def random_feed(inputs: Sequence[Given], batch_size: int, shapes: Mapping[str, tuple[int, ...]] | None = None) -> Feed:
    """A seeded batch: normal numbers for floats, zeros for everything that counts or names something.

    Zero is an index that every table has, and how long a lookup takes hardly depends on the row.

    Args:
        inputs: What the model takes.
        batch_size: Samples.
        shapes: As `closed_shapes` takes them.

    Raises:
        ValueError: as `closed_shapes`, where the model does not take this batch size, and where it takes something that is
            no number.
    """
    random = np.random.default_rng(0)
    feed: Feed = {}
    dtypes = {value.name: value.dtype for value in inputs}
    for value in inputs:
        if value.dtype not in _FLOATS | _COUNTS:
            raise ValueError(f"input '{value.name}' must hold numbers, it is {value.dtype}")
    for name, shape in closed_shapes(inputs, batch_size, shapes or {}).items():
        dtype = dtypes[name]
        feed[name] = (
            random.standard_normal(shape, np.float32).astype(dtype) if dtype in _FLOATS else np.zeros(shape, dtype)
        )
    return feed


def by_the_clock(run: Callable[[], object]) -> Call:
    """A call that is done when it returns, timed from outside."""

    def call() -> int:
        start = time.perf_counter_ns()
        run()
        return time.perf_counter_ns() - start

    return call
