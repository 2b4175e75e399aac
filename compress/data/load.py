"""From the settings of the data to its three splits."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np

from compress.config.data import (
    AnyDataConfig,
    ArraysConfig,
    Augment,
    DigitsConfig,
    ImageFolderConfig,
    PythonConfig,
    TorchvisionConfig,
)
from compress.data.base import Dataset, Input, Split
from compress.data.fingerprint import missing
from compress.data.normalise import measure
from compress.data.splits import Indices, Part, divide, stratified_sample, used
from compress.errors import DataError, listed

_MEASURED_FILES = 1000
_MEASURED_VALUES = 1 << 20  # in one batch: small enough to stay in the cache as float64


class Source(Protocol):
    """Sets of samples that are not yet laid out as splits."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, by label."""

    @property
    def labels(self) -> Mapping[str, Indices]:
        """Per set ('train', and where there are such 'validation' and 'test'): int64, shape (n,)."""

    @property
    def inputs(self) -> tuple[Input, ...]:
        """What a sample consists of, not yet normalised."""

    @property
    def images(self) -> frozenset[str]:
        """Names of the inputs that are images (c, h, w) in [0, 1], to be normalised and augmented."""

    def split(self, name: str, part: Part, inputs: Sequence[Input], augment: Augment, seed: int) -> Split:
        """One split with these of the inputs, normalised as they say; the seed draws its augmented views."""


def load_data(config: AnyDataConfig, seed: int) -> Dataset:
    """Read the data, split it, and measure its mean and standard deviation where they are not given.

    Where only a part of the training split is used, they are measured on that part: whoever has few samples has no others
    to measure on.

    Args:
        config: settings of any kind of data; relative paths are relative to the working directory.
        seed: seeds which samples go to which split and how they are augmented in a view, from 0; the same seed gives the
            same splits and views.

    Raises:
        DataError: anything about the data that does not fit; names the key, and the file or the first bad index.
    """
    problems = missing(config)
    if problems:
        raise DataError("\n".join(str(problem) for problem in problems))
    source = _open(config)
    _check_settings(config, source)

    parts = divide(source.labels, config.validation, config.test_size, seed, source.classes)
    parts["train"] = used(parts["train"], source.labels[parts["train"].origin], config, seed, source.classes)
    _check_classes(source, parts)
    inputs = tuple(_normalised(each, config, source, parts["train"], seed) for each in source.inputs)
    return Dataset(
        classes=source.classes,
        inputs=inputs,
        train=source.split("train", parts["train"], inputs, config.augment, seed),
        validation=source.split("validation", parts["validation"], inputs, Augment(), seed),
        test=source.split("test", parts["test"], inputs, Augment(), seed),
    )


def _open(config: AnyDataConfig) -> Source:
    # Imported where they are needed: scikit-learn and torchvision take a second each.
    if isinstance(config, DigitsConfig):
        from compress.data.digits import read_digits

        return read_digits(config)
    if isinstance(config, ArraysConfig):
        from compress.data.arrays import read_arrays

        return read_arrays(config)
    if isinstance(config, ImageFolderConfig):
        from compress.data.folder import read_folders

        return read_folders(config)
    if isinstance(config, TorchvisionConfig):
        from compress.data.torchvision_sets import read_torchvision

        return read_torchvision(config)
    assert isinstance(config, PythonConfig)
    from compress.data.python_data import read_python

    return read_python(config)


def _check_settings(config: AnyDataConfig, source: Source) -> None:
    """Settings that only images, or images of another size, can have."""
    images = [each for each in source.inputs if each.name in source.images]
    if not images:
        passed = f"inputs of shape {listed(str(each.shape) for each in source.inputs)} are passed through as they are"
        if config.normalize is not None:
            raise DataError(f"data.normalize: is for images; {passed}")
        if config.augment != Augment():
            raise DataError(f"data.augment: is for images; {passed}")
    for each in images:
        which = "the images" if len(images) == 1 else f"the images '{each.name}'"
        if config.normalize is not None and len(config.normalize.mean) != each.shape[0]:
            raise DataError(
                f"data.normalize: has {len(config.normalize.mean)} values, {which} {each.shape[0]} channels"
            )
        if config.augment.crop >= min(each.shape[1:]):
            crop = config.augment.crop
            raise DataError(f"data.augment.crop: shifts by up to {crop} pixels, {which} are {each.shape[1:]}")


def _check_classes(source: Source, parts: dict[str, Part]) -> None:
    """Each class that is to be recognised must have been seen."""
    counts = {
        name: np.bincount(source.labels[part.origin][part.indices], minlength=len(source.classes))
        for name, part in parts.items()
    }
    for name in ("validation", "test"):
        unseen = np.flatnonzero((counts[name] > 0) & (counts["train"] == 0))
        if unseen.size:
            first = source.classes[unseen[0]]
            raise DataError(f"data: class '{first}' occurs in the {name} split but never in the train split")


def _normalised(each: Input, config: AnyDataConfig, source: Source, train: Part, seed: int) -> Input:
    """An input with its mean and standard deviation: given, or measured on the train split (on 1,000 of its files)."""
    if each.name not in source.images:
        return each
    if config.normalize is not None:
        return replace(each, mean=config.normalize.mean, std=config.normalize.std)
    split = source.split("train", train, (each,), Augment(), seed)
    if isinstance(config, ImageFolderConfig):
        split = split.take(stratified_sample(split.labels.numpy(), _MEASURED_FILES, seed))
    batch_size = max(1, _MEASURED_VALUES // math.prod(each.shape))
    mean, std = measure(batch.inputs[0] for batch in split.batches(batch_size))
    return replace(each, mean=mean, std=std)
