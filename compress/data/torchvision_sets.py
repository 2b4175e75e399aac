"""torchvision's classification sets, decoded once into memory."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sized
from typing import Any, Literal

import numpy as np
import torchvision.datasets
from PIL import Image

from compress.config.data import ONLY_INPUT, TorchvisionConfig
from compress.data.arrays import Named, Samples, from_arrays
from compress.data.images import Pixels, centre, pixels, to_mode
from compress.data.memory import MemorySource
from compress.errors import DataError, first_line, nearest

MAX_DECODED_BYTES = 1 << 30
_NOT_CLASSIFICATION = ("VisionDataset", "ImageFolder", "DatasetFolder")
_TEST_NAMES = ("test", "val", "valid")
_USE_PYTHON = "use `kind: python` and a callable that builds it"


def read_torchvision(config: TorchvisionConfig) -> MemorySource:
    """Build the set's training and, where it has one, test split, and decode both.

    The split is chosen by the class's own argument: `train=True/False`, or `split=` with its default for training and
    the first it knows of 'test', 'val', 'valid' for testing. A set with neither argument has a training split only.

    Raises:
        DataError: no such set, files that are not there or cannot be fetched, a set that gives no (image, class)
            pairs, images of several sizes without `image_size`, or more than 1 GB of pixels.
    """
    factory = _factory(config.name)
    train = _build(config, factory, "train")
    if train is None:
        raise DataError(f"data.name: {config.name} has no training split that is known; {_USE_PYTHON}")
    sets = {"train": _decode(config, train, "train")}
    test = _build(config, factory, "test")
    if test is not None:
        sets["test"] = _decode(config, test, "test")
    return from_arrays(sets, {ONLY_INPUT: "nchw"}, _class_names(train), _USE_PYTHON)


def _factory(name: str) -> Callable[..., Any]:
    factory = getattr(torchvision.datasets, name, None)
    if not inspect.isclass(factory) or not issubclass(factory, torchvision.datasets.VisionDataset):
        near = nearest(name, torchvision.datasets.__all__)
        raise DataError(f"data.name: torchvision.datasets has no data set '{name}'{near}")
    if name in _NOT_CLASSIFICATION:
        raise DataError(f"data.name: {name} reads your own files; use `kind: image_folder`")
    return factory


def _build(config: TorchvisionConfig, factory: Callable[..., Any], split: Literal["train", "test"]) -> Any:
    """One split of the set, or None where it has no such split."""
    parameters = inspect.signature(factory).parameters
    fixed: dict[str, Any] = {"root": config.root} if "root" in parameters else {}
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    if "download" in parameters or (config.download and takes_any):
        fixed["download"] = config.download  # said even where it is false: SEMEION's default is true
    unset = [p.name for p in parameters.values() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    unset = [name for name in unset if name != "root"]
    if unset:
        raise DataError(f"data.name: {config.name} needs the argument '{unset[0]}'; {_USE_PYTHON}")
    if "train" in parameters:
        return _call(config, factory, {**fixed, "train": split == "train"})
    if "split" not in parameters:
        return _call(config, factory, fixed) if split == "train" else None
    if split == "train":
        return _call(config, factory, fixed)
    for name in _TEST_NAMES:
        try:
            return _call(config, factory, {**fixed, "split": name})
        except ValueError:
            continue  # the set does not know this name
    return None


def _call(config: TorchvisionConfig, factory: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
    """Build the set; a ValueError about an unknown `split` is passed on."""
    try:
        return factory(**arguments)
    except ValueError as error:
        if "split" in arguments and "split" in str(error):
            raise
        reason: Exception = error
    except Exception as error:  # noqa: BLE001 - each set fails in its own way: offline, broken archive, no scipy …
        reason = error
    text = first_line(reason)
    if config.download:
        raise DataError(f"data.name: {config.name} could not be fetched into {config.root}: {text}") from reason
    raise DataError(
        f"data.root: {config.name} is not in {config.root} ({text}); `download: true` fetches it"
    ) from reason


def _decode(config: TorchvisionConfig, data: Any, split: str) -> Samples:
    """All images (n, c, h, w) uint8 and labels (n,) int64 of one split."""
    assert isinstance(data, Sized)
    labels = np.empty(len(data), dtype=np.int64)
    images: Pixels | None = None
    for index in range(len(data)):
        try:
            found, label = _sample(config, data, index)
        except (OSError, ValueError, TypeError) as error:
            raise DataError(f"data.name: {config.name} {split}[{index}] cannot be read: {error}") from None
        if images is None:
            size = len(data) * found.nbytes
            if size > MAX_DECODED_BYTES:
                raise DataError(
                    f"data.name: {config.name} {split} decodes to {size / 2**30:.1f} GB, more than "
                    f"{MAX_DECODED_BYTES / 2**30:.0f}; set a smaller data.image_size or use `kind: image_folder`"
                )
            images = np.empty((len(data), *found.shape), dtype=np.uint8)
        if found.shape != images.shape[1:]:
            one, other = ("×".join(map(str, shape[1:])) for shape in (images.shape[1:], found.shape))
            raise DataError(f"data.image_size: {config.name} has images of {one} and {other} pixels; set one size")
        images[index], labels[index] = found, label
    if images is None:
        raise DataError(f"data.name: {config.name} {split} is empty")
    name = f"{config.name} {split}"
    return Samples({ONLY_INPUT: Named(name, images)}, Named(f"{name} labels", labels))


def _sample(config: TorchvisionConfig, data: Any, index: int) -> tuple[Pixels, int]:
    """One image (c, h, w), its shorter side resized and its centre cropped where image_size is set, and its label."""
    sample = data[index]
    if not isinstance(sample, tuple) or len(sample) != 2 or not isinstance(sample[0], Image.Image):
        raise TypeError("it is no pair of image and class; use a classification set")
    if isinstance(sample[1], bool) or not isinstance(sample[1], int | np.integer):
        raise TypeError(f"its target is {type(sample[1]).__name__}, not a class number; use a classification set")
    image = to_mode(sample[0], config.channels)
    if config.image_size is not None:
        image = centre(image, config.image_size, config.image_size)
    return pixels(image), int(sample[1])


def _class_names(data: Any) -> tuple[str, ...] | None:
    """The set's own names; ImageNet has several for a class, the first counts."""
    names = getattr(data, "classes", None)
    if not names:
        return None
    return tuple(name if isinstance(name, str) else str(name[0]) for name in names)
