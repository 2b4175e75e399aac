"""Image files in one folder per class, decoded batch by batch by worker processes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader, Dataset

from compress.config.data import ONLY_INPUT, Augment, ImageFolderConfig
from compress.data.base import WHOLE, Batch, Input, Shard
from compress.data.files import IMAGE_EXTENSIONS, class_folders, image_files, split_folders
from compress.data.images import Pixels, centre, open_image, pixels, random_crop
from compress.data.normalise import normalise
from compress.data.order import grouped, shuffled, view_seed
from compress.data.splits import Indices, Part
from compress.errors import DataError, first_line
from compress.machine import cores


@dataclass(frozen=True)
class Cut:
    """How files become inputs: `size`×`size` pixels of `channels`, cut from images whose shorter side is `resize`."""

    size: int
    resize: int
    channels: int
    workers: int


@dataclass(frozen=True)
class FolderSource:
    """Image files of each set with their labels, not yet laid out as splits."""

    classes: tuple[str, ...]
    labels: Mapping[str, Indices]
    paths: Mapping[str, Sequence[Path]]
    cut: Cut

    @property
    def inputs(self) -> tuple[Input, ...]:
        """The image, not yet normalised."""
        return (Input(ONLY_INPUT, (self.cut.channels, self.cut.size, self.cut.size)),)

    @property
    def images(self) -> frozenset[str]:
        """Names of the inputs that are images in [0, 1]."""
        return frozenset({ONLY_INPUT})

    def split(self, name: str, part: Part, inputs: Sequence[Input], augment: Augment, seed: int) -> FolderSplit:
        """One split, normalised as its input says; the seed draws its augmented views."""
        (image,) = inputs
        paths = [self.paths[part.origin][i] for i in part.indices]
        return FolderSplit(name, paths, self.labels[part.origin][part.indices], self.cut, image, augment, seed)


def read_folders(config: ImageFolderConfig) -> FolderSource:
    """List the images of each split folder; nothing is decoded yet.

    Raises:
        DataError: a class without images, or a resize too small for the crop.
    """
    resize = config.resize or round(config.image_size / 0.875)
    if resize < config.image_size:
        raise DataError(f"data.resize: must be at least image_size ({config.image_size}), got {resize}")
    classes: tuple[str, ...] = ()
    paths: dict[str, list[Path]] = {}
    labels: dict[str, Indices] = {}
    for split, (key, folder) in split_folders(config).items():
        classes = tuple(class_folders(folder))
        found = [image_files(folder / name) for name in classes]
        without = [name for name, files in zip(classes, found, strict=True) if not files]
        if without:
            endings = ", ".join(IMAGE_EXTENSIONS)
            also = (
                f", nor {'does another' if len(without) == 2 else f'do {len(without) - 1} others'}"
                if without[1:]
                else ""
            )
            raise DataError(
                f"data.{key}: class folder {folder / without[0]} holds no image{also} (accepted: {endings})"
            )
        paths[split] = [path for files in found for path in files]
        labels[split] = np.repeat(np.arange(len(classes)), [len(files) for files in found])
    return FolderSource(classes, labels, paths, Cut(config.image_size, resize, config.channels, config.workers))


class FolderSplit:
    """Image files with labels; a `compress.data.base.Split`."""

    repeats = True

    def __init__(
        self,
        name: str,
        paths: Sequence[Path],
        labels: Indices,
        cut: Cut,
        image: Input,
        augment: Augment,
        seed: int,
    ) -> None:
        self.name = name
        self.labels = torch.from_numpy(labels)
        self._paths, self._cut, self._image, self._augment, self._seed = paths, cut, image, augment, seed

    def __len__(self) -> int:
        """Number of samples."""
        return len(self._paths)

    def batches(
        self,
        batch_size: int,
        *,
        seed: int | None = None,
        drop_last: bool = False,
        view: int | None = None,
        shard: Shard = WHOLE,
    ) -> Iterator[Batch]:
        """See `compress.data.base.Split`.

        Every image is drawn from its own stream of (seed, position), so that neither the batch size nor the number of
        workers changes it. With `augment.crop` 0 the crop stays central; any crop above 0 turns on the random resized
        crop, whatever its number of pixels.
        """
        order, _ = shuffled(len(self), seed)
        groups = grouped(order, batch_size, drop_last=drop_last, shard=shard)
        drawn_from = seed if view is None else view_seed(self._seed, view)
        decoder = _Decoder(self._paths, self._cut, self._augment, drawn_from)
        decoded = _decoded(decoder, [group for group in groups if len(group)], self._cut.workers)
        for group in groups:
            images = next(decoded) if len(group) else np.empty((0, *self._image.shape), dtype=np.uint8)
            inputs = torch.from_numpy(images).to(torch.float32).div_(255)
            if self._image.mean:
                inputs = normalise(inputs, self._image.mean, self._image.std)
            yield Batch((inputs,), self.labels[group], group, 0 if self._augment == Augment() else view)

    def take(self, indices: Sequence[int]) -> FolderSplit:
        """The samples at `indices`, in that order, never augmented."""
        chosen = np.asarray(indices, dtype=np.int64)
        paths = [self._paths[i] for i in chosen]
        labels = self.labels.numpy()[chosen]
        return FolderSplit(self.name, paths, labels, self._cut, self._image, Augment(), self._seed)


class _Decoder(Dataset[Pixels | DataError]):
    """Decodes and crops the image at a position; runs in the workers."""

    def __init__(self, paths: Sequence[Path], cut: Cut, augment: Augment, seed: int | None) -> None:
        self._paths, self._cut, self._augment, self._seed = paths, cut, augment, seed

    def __getitem__(self, index: int) -> Pixels | DataError:
        cut = self._cut
        try:
            image = open_image(self._paths[index], cut.channels)
        except DataError as error:
            return error  # a worker that raises would put its traceback into the message
        rng = None if self._seed is None else np.random.default_rng([self._seed, index])
        if rng is not None and self._augment.crop > 0:
            image = random_crop(image, cut.size, rng)
        else:
            image = centre(image, cut.resize, cut.size)
        found = pixels(image)
        mirror = rng is not None and self._augment.flip and rng.random() < 0.5
        return np.ascontiguousarray(found[:, :, ::-1]) if mirror else found


def _stack(images: list[Pixels | DataError]) -> npt.NDArray[np.uint8] | DataError:
    """Images (c, h, w) of a batch as (n, c, h, w), or the first error among them."""
    for image in images:
        if isinstance(image, DataError):
            return image
    return np.stack([image for image in images if not isinstance(image, DataError)])


def _decoded(decoder: _Decoder, groups: list[torch.Tensor], workers: int) -> Iterator[npt.NDArray[np.uint8]]:
    """Batches of pixels (n, c, h, w).

    They leave the workers as arrays, not as tensors: tensors travel through shared memory, of which a container has
    64 MB unless told otherwise.
    """
    loader: DataLoader[Pixels | DataError] = DataLoader(
        decoder,
        batch_sampler=[group.tolist() for group in groups],
        num_workers=min(workers, len(groups), cores()),
        collate_fn=_stack,
        generator=torch.Generator().manual_seed(0),  # the global one must not move
    )
    try:
        for images in loader:
            if isinstance(images, DataError):
                raise images
            yield images
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise DataError(f"data.workers: a worker process died ({first_line(error)}); try `workers: 0`") from None
