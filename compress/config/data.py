"""Settings of the data: where it comes from, how it is split, normalised and augmented."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from compress.config.base import Config, Fraction, OpenFraction

Channels = Annotated[Literal[1, 3], Field(description="Channels of the model's input: 1 is grey, 3 is RGB.")]
ImageSize = Annotated[int, Field(ge=1, le=4096, description="Height and width of the model's input, pixels.")]
Layout = Literal["auto", "nhwc", "nchw", "any"]
ONLY_INPUT = "input"
"""What the input of a model with one input is called, where its data does not name it."""
INPUT_NAMES = "names are letters, digits and _, do not begin with a digit, and are not 'logits'"
_KIND = "Where the data comes from; decides which other keys there are."


def is_input_name(name: str) -> bool:
    """Whether an input may be called that: ONNX files and metadata use the name."""
    return re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII) is not None and name != "logits"


def _name_in(pattern: str) -> str:
    """'meta' in '{split}_meta'."""
    return pattern.replace("{split}", "").strip("_-. ")


class Validation(Config):
    """Where the validation split comes from. Every decision of the pipeline reads this split and no other."""

    source: Literal["train", "test", "given"] = Field(
        default="train",
        alias="from",
        description="'train' and 'test' split it off that set (seeded, stratified); 'given' takes the data's own. "
        "Use 'test' or 'given' when the source model was trained on all of train.",
    )
    size: int | OpenFraction = Field(
        default=0.15, description="Samples (a whole number) or fraction of the set it is split off; unused for 'given'."
    )

    @model_validator(mode="after")
    def _positive(self) -> Self:
        if self.size <= 0:
            raise ValueError(f"size: must be greater than 0, got {self.size}")
        return self


class Normalize(Config):
    """Per-channel mean and standard deviation on inputs scaled to [0, 1]."""

    mean: tuple[float, ...] = Field(min_length=1, description="One value per channel, in units of inputs in [0, 1].")
    std: tuple[Annotated[float, Field(gt=0.0)], ...] = Field(min_length=1, description="One value per channel, > 0.")

    @model_validator(mode="after")
    def _same_length(self) -> Self:
        if len(self.mean) != len(self.std):
            raise ValueError(f"mean has {len(self.mean)} values and std {len(self.std)}; they must agree")
        return self


class Augment(Config):
    """Random changes to training images, drawn anew each epoch."""

    crop: int = Field(
        default=0,
        ge=0,
        description="Shift by up to this many pixels, edges repeated; image_folder: above 0 crops at random instead.",
    )
    flip: bool = Field(default=False, description="Mirror left to right half of the time.")


class DataConfig(Config):
    """What all kinds of data share."""

    normalize: Normalize | None = Field(
        default=None,
        description="Mean and standard deviation; measured on the training samples that are used when left out.",
    )
    augment: Augment = Augment()
    validation: Validation = Validation()
    fraction: Fraction = Field(
        default=1.0,
        description="Part of each class of the training split that is used, at least one sample, drawn by the seed. "
        "Validation and test stay as they are; a larger fraction holds the samples of a smaller one.",
    )
    per_class: int | None = Field(
        default=None, ge=1, description="Training samples used of each class, instead of a fraction."
    )

    brings_validation: ClassVar[bool] = True

    @model_validator(mode="after")
    def _validation_exists(self) -> Self:
        if self.validation.source == "given" and not self.brings_validation:
            raise ValueError(
                "validation: there is none to be given with this kind of data; use from: train or from: test"
            )
        return self

    @model_validator(mode="after")
    def _one_amount(self) -> Self:
        if self.per_class is not None and self.fraction < 1.0:
            raise ValueError(f"per_class: there is a fraction ({self.fraction}), too; leave one of them out")
        return self


class DigitsConfig(DataConfig):
    """scikit-learn's bundled 1,797 real handwritten digits (8x8, UCI), resized; needs no download."""

    brings_validation: ClassVar[bool] = False

    kind: Literal["digits"] = Field(description=_KIND)
    image_size: ImageSize = 32
    channels: Channels = Field(default=3, description="3 repeats the grey image, as most image networks expect.")
    test_size: OpenFraction = Field(default=0.2, description="Fraction of all digits kept for the test split.")


class ArraysConfig(DataConfig):
    """Arrays on disk: `<split>_images.npy` and `<split>_labels.npy` in a folder, or the same names in one `.npz`."""

    kind: Literal["arrays"] = Field(description=_KIND)
    root: Path = Field(description="A folder of .npy files, or one .npz file.")
    inputs: str | Annotated[tuple[str, ...], Field(min_length=1)] = Field(
        default="{split}_images",
        description="Array name of the input; {split} is train, validation or test. A list of names for models with "
        "several inputs, in the order in which they take them: '{split}_meta' is the input 'meta'.",
    )
    labels: str = Field(default="{split}_labels", description="Array name of the labels, integers from 0.")
    layout: Layout | Annotated[tuple[Layout, ...], Field(min_length=1)] = Field(
        default="auto",
        description="Axis order of images; 'any' passes tensors of any shape through; 'auto' tells by shape and type. "
        "One for all inputs, or a list with one for each.",
    )
    classes: tuple[str, ...] | None = Field(default=None, description="Class names; '0', '1', … when left out.")
    test_size: OpenFraction = Field(
        default=0.2, description="Fraction of train split off where there is no test array."
    )

    @model_validator(mode="after")
    def _inputs_differ(self) -> Self:
        if isinstance(self.inputs, str):
            if not isinstance(self.layout, str):
                raise ValueError("layout: is a list, so inputs must be one, too")
            return self
        if not isinstance(self.layout, str) and len(self.layout) != len(self.inputs):
            raise ValueError(
                f"layout: must have one item for each of the {len(self.inputs)} inputs, got {len(self.layout)}"
            )
        names: dict[str, str] = {}
        for pattern in self.inputs:
            name = _name_in(pattern)
            if not is_input_name(name):
                raise ValueError(f"inputs: '{pattern}' gives the input no name; {INPUT_NAMES}, got '{name}'")
            if name in names:
                raise ValueError(f"inputs: '{names[name]}' and '{pattern}' are both called '{name}'")
            names[name] = pattern
        return self

    @property
    def named_inputs(self) -> dict[str, str]:
        """Name of each input, and the pattern of its array names."""
        if isinstance(self.inputs, str):
            return {ONLY_INPUT: self.inputs}
        return {_name_in(pattern): pattern for pattern in self.inputs}

    @property
    def layouts(self) -> tuple[Layout, ...]:
        """The layout of each input."""
        return (self.layout,) * len(self.named_inputs) if isinstance(self.layout, str) else self.layout


class ImageFolderConfig(DataConfig):
    """Image files in one folder per class, in one folder per split: `root/train/cat/1.jpg`."""

    kind: Literal["image_folder"] = Field(description=_KIND)
    root: Path = Field(description="Folder that holds the split folders.")
    train: str = Field(default="train", description="Folder name of the training images.")
    test: str | None = Field(default="test", description="Folder name of the test images; null splits them off train.")
    given: str | None = Field(
        default=None, description="Folder name of validation images, for validation: {from: given}."
    )
    image_size: ImageSize = 224
    resize: int | None = Field(
        default=None, ge=1, le=8192, description="Shorter side before the centre crop, pixels; image_size / 0.875."
    )
    channels: Channels = 3
    test_size: OpenFraction = Field(default=0.2, description="Fraction of train split off where test is null.")
    workers: int = Field(default=2, ge=0, le=64, description="Processes that decode images; 0 decodes in the run's.")


class TorchvisionConfig(DataConfig):
    """One of torchvision's classification sets, by its class name."""

    brings_validation: ClassVar[bool] = False

    kind: Literal["torchvision"] = Field(description=_KIND)
    name: str = Field(min_length=1, description="Class name in torchvision.datasets, such as CIFAR10 or FashionMNIST.")
    root: Path = Field(description="Folder where torchvision keeps or puts the files.")
    download: bool = Field(default=False, description="Fetch the files when they are not in root.")
    image_size: ImageSize | None = Field(default=None, description="Resize to this; the set's own size when left out.")
    channels: Channels = 3
    test_size: OpenFraction = Field(
        default=0.2, description="Fraction of train split off where the set has no test split."
    )


class PythonConfig(DataConfig):
    """Your own data: a callable that returns the splits."""

    kind: Literal["python"] = Field(description=_KIND)
    callable: str = Field(
        pattern=r"^[^:]+:[A-Za-z_]\w*$",
        description="'package.module:function' or 'path/to/file.py:function'; returns a mapping with 'train' "
        "and optionally 'validation', 'test' (each a pair of arrays or a map-style dataset; several inputs as a mapping "
        "from name to array), 'layout' and 'classes'.",
    )
    kwargs: dict[str, str | int | float | bool | None] = Field(default={}, description="Arguments of the callable.")
    test_size: OpenFraction = Field(
        default=0.2, description="Fraction of train split off where 'test' is not returned."
    )


AnyDataConfig = Annotated[
    DigitsConfig | ArraysConfig | ImageFolderConfig | TorchvisionConfig | PythonConfig, Field(discriminator="kind")
]
