"""Common corruptions of images, and of plain numbers, at severities 1 to 5.

Families and strengths follow Hendrycks & Dietterich 2019, "Benchmarking Neural Network Robustness to Common Corruptions
and Perturbations", arXiv:1903.12261, section 3, whose authors publish strengths for images of 32 and of 224 pixels
(CIFAR-10-C and ImageNet-C; their public program names the numbers). The implementation is our own and differs in details,
so that results stand beside each other, not beside published ones. Occlusion and missing pixels are not theirs.

Every image has a random generator of its own: what happens to it does not depend on its batch. One generator gives the
same pattern at every severity, only stronger.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, TypeAlias

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

SEVERITIES: Final = (1, 2, 3, 4, 5)
Generators: TypeAlias = Sequence[torch.Generator]
"""One per sample, on the CPU."""
Apply: TypeAlias = Callable[[Tensor, float, Generators], Tensor]

_SMALL, _LARGE = 32, 224
_REACH = 4.0
"""Standard deviations at which a Gaussian is cut."""
_GREY = 0.5


@dataclass(frozen=True)
class Family:
    """One kind of corruption of images (n, c, h, w) in [0, 1], and how strong it is."""

    what: str
    """What happens to an image."""
    unit: str
    """What its strength is."""
    small: tuple[float, ...]
    """Strengths at severities 1 to 5 for images of 32 pixels."""
    large: tuple[float, ...]
    """The same for 224 pixels."""
    source: str
    """Where the strengths come from."""
    apply: Apply
    is_length: bool = False
    """Whether the strength is a number of pixels."""

    def strength(self, severity: int, side: int) -> float:
        """Strength for images whose shorter side has this many pixels.

        Between 32 and 224 pixels it lies between the two published ones, evenly on logarithmic scales of both; beyond them
        it stays as it is, and what is a number of pixels grows and shrinks with the image.

        Raises:
            ValueError: where there is no such severity.
        """
        if severity not in SEVERITIES:
            raise ValueError(f"severity must be one of {SEVERITIES}, got {severity}")
        small, large = self.small[severity - 1], self.large[severity - 1]
        within = min(max(side, _SMALL), _LARGE)
        share = math.log(within / _SMALL) / math.log(_LARGE / _SMALL)
        found = small * math.exp(share * math.log(large / small))
        return found * side / within if self.is_length else found


def corrupt(
    images: Float[Tensor, "n c h w"], family: str, severity: int, generators: Generators
) -> Float[Tensor, "n c h w"]:
    """Images as they come out of a corruption.

    Args:
        images: in [0, 1], any number of channels, on the CPU.
        family: one of `FAMILIES`.
        severity: 1 to 5.
        generators: one per image; they are advanced.

    Returns:
        As many, in [0, 1].

    Raises:
        ValueError: where there is no such family or severity, or not one generator per image.
    """
    if family not in FAMILIES:
        raise ValueError(f"family must be one of {', '.join(FAMILIES)}, got '{family}'")
    _check_count(images, generators)
    chosen = FAMILIES[family]
    strength = chosen.strength(severity, min(images.shape[2:]))
    return chosen.apply(images, strength, generators).clamp(0.0, 1.0)


@dataclass(frozen=True)
class ValueFamily:
    """One kind of corruption of numbers that are no images; own strengths, relative to the spread of each feature."""

    what: str
    unit: str
    strengths: tuple[float, ...]
    """At severities 1 to 5."""
    apply: Callable[[Tensor, Tensor, Tensor, float, Generators], Tensor]


def corrupt_values(
    values: Float[Tensor, "n ..."],
    mean: Float[Tensor, ...],
    std: Float[Tensor, ...],
    family: str,
    severity: int,
    generators: Generators,
) -> Float[Tensor, "n ..."]:
    """Numbers of any shape, such as measurements, as they come out of a corruption.

    Args:
        values: any range.
        mean: of each feature, the shape of one sample.
        std: the same; a feature with 0 gets no noise.
        family: one of `VALUE_FAMILIES`.
        severity: 1 to 5.
        generators: one per sample; they are advanced.

    Raises:
        ValueError: where there is no such family or severity, or not one generator per sample.
    """
    if family not in VALUE_FAMILIES:
        raise ValueError(f"family must be one of {', '.join(VALUE_FAMILIES)}, got '{family}'")
    if severity not in SEVERITIES:
        raise ValueError(f"severity must be one of {SEVERITIES}, got {severity}")
    _check_count(values, generators)
    chosen = VALUE_FAMILIES[family]
    return chosen.apply(values, mean, std, chosen.strengths[severity - 1], generators)


def _check_count(samples: Tensor, generators: Generators) -> None:
    if len(samples) != len(generators):
        raise ValueError(f"needs one generator per sample, got {len(generators)} for {len(samples)}")


def _normal(shape: Sequence[int], generators: Generators) -> Tensor:
    return torch.stack([torch.randn(tuple(shape), generator=generator) for generator in generators])


def _uniform(shape: Sequence[int], generators: Generators) -> Tensor:
    return torch.stack([torch.rand(tuple(shape), generator=generator) for generator in generators])


def _gaussian_noise(images: Tensor, std: float, generators: Generators) -> Tensor:
    return images + std * _normal(images.shape[1:], generators)


def _shot_noise(images: Tensor, photons: float, generators: Generators) -> Tensor:
    counts = [torch.poisson(image * photons, generator=each) for image, each in zip(images, generators, strict=True)]
    return torch.stack(counts) / photons


def _impulse_noise(images: Tensor, share: float, generators: Generators) -> Tensor:
    drawn = _uniform((2, *images.shape[1:]), generators)
    return torch.where(drawn[:, 0] < share, (drawn[:, 1] < 0.5).to(images.dtype), images)


def _gaussian_blur(images: Tensor, sigma: float, _: Generators) -> Tensor:
    down, across = (_blurring(side, sigma).to(images.dtype) for side in images.shape[2:])
    return down @ images @ across.T


def _blurring(side: int, sigma: float) -> Tensor:
    """Matrix (side, side) that blurs a line of pixels; beyond its ends it goes on with the last pixel."""
    reach = math.ceil(_REACH * sigma)
    offsets = torch.arange(-reach, reach + 1)
    weights = torch.exp(-0.5 * (offsets.double() / sigma) ** 2)
    places = (torch.arange(side)[:, None] + offsets).clamp(0, side - 1)
    matrix = torch.zeros(side, side, dtype=torch.float64)
    return matrix.scatter_add_(1, places, (weights / weights.sum()).expand(side, -1))


def _pixelate(images: Tensor, share: float, _: Generators) -> Tensor:
    fewer = [max(1, int(side * share)) for side in images.shape[2:]]
    down, across = (
        _averaging(side, count).to(images.dtype) for side, count in zip(images.shape[2:], fewer, strict=True)
    )
    blocks = down @ images @ across.T
    rows, columns = (
        ((torch.arange(side) + 0.5) * count / side).long() for side, count in zip(images.shape[2:], fewer, strict=True)
    )
    return blocks[:, :, rows][:, :, :, columns]


def _averaging(side: int, count: int) -> Tensor:
    """Matrix (count, side) of means over equal parts of a line of pixels, of which a part may hold fractions."""
    edges = torch.arange(count + 1, dtype=torch.float64) * side / count
    pixels = torch.arange(side, dtype=torch.float64)
    shared = torch.minimum(edges[1:, None], pixels + 1) - torch.maximum(edges[:-1, None], pixels)
    return shared.clamp(min=0.0) * count / side


def _jpeg(images: Tensor, quality: float, _: Generators) -> Tensor:
    """Colour where there are three channels, else every channel by itself in grey."""
    bytes_ = (images * 255).round().to(torch.uint8)
    planes = bytes_.permute(0, 2, 3, 1) if images.shape[1] == 3 else bytes_.flatten(0, 1)
    coded = torch.from_numpy(np.stack([_through_jpeg(plane.numpy(), round(quality)) for plane in planes]))
    restored = coded.permute(0, 3, 1, 2) if images.shape[1] == 3 else coded.view(images.shape)
    return restored.to(images.dtype) / 255


def _through_jpeg(
    plane: np.ndarray[tuple[int, ...], np.dtype[np.uint8]], quality: int
) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    with io.BytesIO() as stream:
        Image.fromarray(np.ascontiguousarray(plane)).save(stream, "JPEG", quality=quality)
        with Image.open(stream) as image:
            return np.array(image, dtype=np.uint8)


def _brightness(images: Tensor, added: float, _: Generators) -> Tensor:
    """The value of the HSV model, which is the largest channel, grows; hue and saturation stay."""
    value = images.amax(1, keepdim=True)
    brighter = (value + added).clamp(max=1.0)
    return torch.where(value > 0, images / value.clamp(min=torch.finfo(images.dtype).tiny) * brighter, brighter)


def _contrast(images: Tensor, share: float, _: Generators) -> Tensor:
    mean = images.mean((2, 3), keepdim=True)
    return mean + share * (images - mean)


def _occlusion(images: Tensor, share: float, generators: Generators) -> Tensor:
    """A grey square somewhere in the image (as Zeiler & Fergus 2014, arXiv:1311.2901, section 4.2, move across it)."""
    height, width = images.shape[2:]
    side = max(1, round(share * min(height, width)))
    free = torch.tensor([height - side + 1, width - side + 1])
    top, left = (_uniform((2,), generators) * free).long().T
    rows, columns = torch.arange(height), torch.arange(width)
    is_row = (rows >= top[:, None]) & (rows < top[:, None] + side)
    is_column = (columns >= left[:, None]) & (columns < left[:, None] + side)
    return torch.where((is_row[:, :, None] & is_column[:, None, :])[:, None], _GREY, images)


def _missing_pixels(images: Tensor, share: float, generators: Generators) -> Tensor:
    """Pixels that are lost become the image's mean colour: black would also darken it, which is another corruption."""
    is_missing = _uniform(images.shape[2:], generators) < share
    return torch.where(is_missing[:, None], images.mean((2, 3), keepdim=True), images)


def _value_noise(values: Tensor, _: Tensor, std: Tensor, strength: float, generators: Generators) -> Tensor:
    return values + strength * std * _normal(values.shape[1:], generators)


def _missing_values(values: Tensor, mean: Tensor, _: Tensor, share: float, generators: Generators) -> Tensor:
    return torch.where(_uniform(values.shape[1:], generators) < share, mean, values)


_PUBLISHED = "Hendrycks & Dietterich 2019, arXiv:1903.12261: CIFAR-10-C and ImageNet-C"
_OWN = "our own choice"

FAMILIES: Final = MappingProxyType(
    {
        "gaussian_noise": Family(
            "Gaussian noise is added to every value",
            "standard deviation, pixels in [0, 1]",
            (0.04, 0.06, 0.08, 0.09, 0.10),
            (0.08, 0.12, 0.18, 0.26, 0.38),
            _PUBLISHED,
            _gaussian_noise,
        ),
        "shot_noise": Family(
            "every value is counted in photons (Poisson noise)",
            "photons of a white pixel",
            (500.0, 250.0, 100.0, 75.0, 50.0),
            (60.0, 25.0, 12.0, 5.0, 3.0),
            _PUBLISHED,
            _shot_noise,
        ),
        "impulse_noise": Family(
            "values become 0 or 1 (salt and pepper)",
            "share of the values",
            (0.01, 0.02, 0.03, 0.05, 0.07),
            (0.03, 0.06, 0.09, 0.17, 0.27),
            _PUBLISHED,
            _impulse_noise,
        ),
        "gaussian_blur": Family(
            "the image is blurred by a Gaussian",
            "its standard deviation, pixels",
            (0.4, 0.6, 0.7, 0.8, 1.0),
            (1.0, 2.0, 3.0, 4.0, 6.0),
            _PUBLISHED,
            _gaussian_blur,
            is_length=True,
        ),
        "pixelate": Family(
            "the image is made smaller by averaging and larger again in blocks",
            "size of the smaller one, as a share",
            (0.95, 0.9, 0.85, 0.75, 0.65),
            (0.6, 0.5, 0.4, 0.3, 0.25),
            _PUBLISHED,
            _pixelate,
        ),
        "jpeg": Family(
            "the image is stored as a JPEG",
            "quality of Pillow's encoder",
            (80.0, 65.0, 58.0, 50.0, 40.0),
            (25.0, 18.0, 15.0, 10.0, 7.0),
            _PUBLISHED,
            _jpeg,
        ),
        "brightness": Family(
            "the image gets brighter: the value of its HSV colours grows",
            "what is added to the value",
            (0.05, 0.1, 0.15, 0.2, 0.3),
            (0.1, 0.2, 0.3, 0.4, 0.5),
            _PUBLISHED,
            _brightness,
        ),
        "contrast": Family(
            "all pixels come nearer to the image's mean",
            "share of the contrast that is left",
            (0.75, 0.5, 0.4, 0.3, 0.15),
            (0.4, 0.3, 0.2, 0.1, 0.05),
            _PUBLISHED,
            _contrast,
        ),
        "occlusion": Family(
            "a grey square covers part of the image",
            "its side, as a share of the shorter side",
            (0.2, 0.3, 0.4, 0.5, 0.6),
            (0.2, 0.3, 0.4, 0.5, 0.6),
            _OWN,
            _occlusion,
        ),
        "missing_pixels": Family(
            "pixels are lost and become the image's mean colour",
            "share of the pixels",
            (0.1, 0.2, 0.3, 0.45, 0.6),
            (0.1, 0.2, 0.3, 0.45, 0.6),
            _OWN,
            _missing_pixels,
        ),
    }
)
"""Corruptions of images, by name."""

VALUE_FAMILIES: Final = MappingProxyType(
    {
        "value_noise": ValueFamily(
            "Gaussian noise is added to every value",
            "standard deviation, in those of the feature",
            (0.1, 0.2, 0.3, 0.5, 0.8),
            _value_noise,
        ),
        "missing_values": ValueFamily(
            "values are lost and become the feature's mean",
            "share of the values",
            (0.1, 0.2, 0.3, 0.45, 0.6),
            _missing_values,
        ),
    }
)
"""Corruptions of numbers that are no images, by name."""
