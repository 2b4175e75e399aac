"""Two samples made one: mixup and CutMix as pure functions, and the random numbers they take.

One mixing number and one box count for a whole batch, as in the authors' code of both; each sample's partner is given by a
permutation of the batch, so that nothing needs to be loaded twice.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from compress.errors import StageError


@dataclass(frozen=True)
class Box:
    """Rows `top` to `bottom` and columns `left` to `right` of an image, the ends excluded, in pixels."""

    top: int
    bottom: int
    left: int
    right: int

    @property
    def area(self) -> int:
        """Pixels inside."""
        return (self.bottom - self.top) * (self.right - self.left)


def mixup(
    inputs: tuple[Tensor, ...],
    labels: Int[Tensor, " n"],
    classes: int,
    share: float,
    permutation: Int[Tensor, " n"],
) -> tuple[tuple[Tensor, ...], Float[Tensor, "n classes"]]:
    """Each sample blended with its partner: share · x + (1 - share) · x[permutation], and its label likewise.

    A share of 1 gives the inputs as they are, one of 0 gives the partners.

    Source: Zhang, Cisse, Dauphin, Lopez-Paz 2018, "mixup: Beyond Empirical Risk Minimization", arXiv:1710.09412, section 2,
    eq. 1.

    Args:
        inputs: a model's inputs, each (n, ...), of floats.
        labels: class indices from 0.
        classes: number of classes.
        share: the paper's λ, 0 to 1, from `draw_share`.
        permutation: the partner of each sample.

    Returns:
        New inputs, and a probability per class (rows sum to 1) for `label_loss`.

    Raises:
        StageError: where an input is not of floats: half of one word and half of another is no word.
    """
    for position, each in enumerate(inputs, start=1):
        if not each.is_floating_point():
            raise StageError(
                f"mixup blends inputs of floats, but input {position} holds {_kind(each)}; leave mixup out"
            )
    mixed = tuple(share * each + (1 - share) * each[permutation] for each in inputs)
    return mixed, _targets(labels, classes, share, permutation)


def cutmix(
    inputs: tuple[Tensor, ...],
    labels: Int[Tensor, " n"],
    classes: int,
    box: Box,
    permutation: Int[Tensor, " n"],
) -> tuple[tuple[Tensor, ...], Float[Tensor, "n classes"]]:
    """Each image with a box of its partner in it; of the label as much remains as of the image.

    An empty box gives the inputs as they are, one over the whole image gives the partners.

    Source: Yun, Han, Oh, Chun, Choe, Yoo 2019, "CutMix: Regularization Strategy to Train Strong Classifiers with
    Localizable Features" (ICCV), arXiv:1905.04899, section 3.1, eq. 1. The share of the label is that of the pixels that
    remain, after the box was cut off at the image's edges.

    Args:
        inputs: images (n, channels, height, width) of floats, all of one height and width.
        labels: class indices from 0.
        classes: number of classes.
        box: what is replaced, from `draw_box`.
        permutation: the partner of each sample.

    Returns:
        New inputs, and a probability per class (rows sum to 1) for `label_loss`.

    Raises:
        StageError: where an input is not such an image.
    """
    height, width = _image_size(inputs)
    assert 0 <= box.top <= box.bottom <= height, f"{box} does not lie in an image of {height} rows"
    assert 0 <= box.left <= box.right <= width, f"{box} does not lie in an image of {width} columns"
    inside = (..., slice(box.top, box.bottom), slice(box.left, box.right))
    mixed = tuple(each.clone() for each in inputs)
    for each, old in zip(mixed, inputs, strict=True):
        each[inside] = old[inside][permutation]
    return mixed, _targets(labels, classes, 1 - box.area / (height * width), permutation)


def draw_share(alpha: float, generator: torch.Generator) -> float:
    """A share of the first sample, 0 to 1, drawn from Beta(alpha, alpha).

    Small values of alpha leave most samples almost as they are, 1 makes all shares equally likely, larger ones favour halves.

    Args:
        alpha: above 0.
        generator: on the CPU; one number is taken from it.
    """
    # torch's own beta distribution takes no generator.
    seed = int(torch.randint(2**63 - 1, (), generator=generator))
    return float(np.random.default_rng(seed).beta(alpha, alpha))


def draw_box(share: float, height: int, width: int, generator: torch.Generator) -> Box:
    """A box for `cutmix` with the image's proportions, around a pixel drawn from the image, cut off at its edges.

    Without its edges the box would cover 1 - share of the image: its sides are √(1 - share) of the image's, rounded down.

    Source: Yun et al. 2019, arXiv:1905.04899, section 3.1, eq. 2.

    Args:
        share: what remains of the image where nothing is cut off, 0 to 1, from `draw_share`.
        height: of the image, in pixels.
        width: of the image, in pixels.
        generator: on the CPU; two numbers are taken from it.
    """
    part = math.sqrt(1 - share)
    top, bottom = _interval(int(part * height), height, generator)
    left, right = _interval(int(part * width), width, generator)
    return Box(top, bottom, left, right)


def _interval(length: int, size: int, generator: torch.Generator) -> tuple[int, int]:
    start = int(torch.randint(size, (), generator=generator)) - length // 2
    return max(start, 0), min(start + length, size)


def _targets(
    labels: Int[Tensor, " n"], classes: int, share: float, permutation: Int[Tensor, " n"]
) -> Float[Tensor, "n classes"]:
    certain = F.one_hot(labels.long(), classes).float()
    return share * certain + (1 - share) * certain[permutation]


def _image_size(inputs: tuple[Tensor, ...]) -> tuple[int, int]:
    for position, each in enumerate(inputs, start=1):
        if each.dim() != 4 or not each.is_floating_point():
            raise StageError(
                f"cutmix needs images (n, channels, height, width) of floats, but input {position} is {tuple(each.shape)} of "
                f"{_kind(each)}; leave cutmix out"
            )
    sizes = {(each.shape[2], each.shape[3]) for each in inputs}
    if len(sizes) > 1:
        found = ", ".join(f"{height}×{width}" for height, width in sorted(sizes))
        raise StageError(f"cutmix needs images of one size, but the inputs have {found}; leave cutmix out")
    return sizes.pop()


def _kind(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
