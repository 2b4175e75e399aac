"""One image file to one array of pixels, with Pillow; the geometry is torchvision's."""

from __future__ import annotations

import math
import struct
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from compress.errors import DataError

Pixels = npt.NDArray[np.uint8]
_BROKEN = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)
_SCALE, _RATIO, _TRIES = (0.25, 1.0), (3 / 4, 4 / 3), 10


def open_image(path: Path, channels: int) -> Image.Image:
    """Decoded image, upright by its EXIF tag, as RGB (3 channels) or L (1).

    Raises:
        DataError: the file is no image, is cut short, or has 32-bit pixels; names it.
    """
    try:
        with Image.open(path) as image:
            return to_mode(ImageOps.exif_transpose(image), channels)
    except UnidentifiedImageError:  # its text repeats the path
        raise DataError(f"data.root: {path} cannot be decoded: it is no image of a known format") from None
    except _BROKEN as error:
        told = (error.strerror if isinstance(error, OSError) else None) or error
        raise DataError(f"data.root: {path} cannot be decoded: {told}") from None


def to_mode(image: Image.Image, channels: int) -> Image.Image:
    """The image as RGB or L; 16-bit grey is scaled, where Pillow alone would cut it off at 255.

    Raises:
        ValueError: 32-bit integer or float pixels, whose range nobody knows.
    """
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError("it has 32-bit pixels of unknown range; convert it to 8 bits")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # the same colours, without Pillow's warning
    return image.convert("RGB" if channels == 3 else "L")


def pixels(image: Image.Image) -> Pixels:
    """Pixels of an RGB or L image, shape (c, h, w)."""
    array = np.asarray(image)
    return np.ascontiguousarray(array[None] if array.ndim == 2 else array.transpose(2, 0, 1))


def centre(image: Image.Image, resize: int, size: int) -> Image.Image:
    """Shorter side to `resize` pixels (bilinear, antialiased), then the central `size`×`size` pixels."""
    width, height = image.size
    short = min(width, height)
    wide, high = int(resize * width / short), int(resize * height / short)
    image = image.resize((wide, high), Image.Resampling.BILINEAR)
    left, top = round((wide - size) / 2.0), round((high - size) / 2.0)
    return image.crop((left, top, left + size, top + size))


def random_crop(image: Image.Image, size: int, rng: np.random.Generator) -> Image.Image:
    """A random part resized to `size`×`size`: 25 to 100 % of the area, sides at 3:4 to 4:3 (Szegedy et al. 2015)."""
    width, height = image.size
    box = _random_box(width, height, rng)
    return image.crop(box).resize((size, size), Image.Resampling.BILINEAR)


def _random_box(width: int, height: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
    for _ in range(_TRIES):
        area = width * height * rng.uniform(*_SCALE)
        ratio = math.exp(rng.uniform(math.log(_RATIO[0]), math.log(_RATIO[1])))
        wide, high = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < wide <= width and 0 < high <= height:
            left, top = int(rng.integers(width - wide + 1)), int(rng.integers(height - high + 1))
            return left, top, left + wide, top + high
    # Very long images: the largest central part whose sides are within the ratio.
    wide, high = min(width, round(height * _RATIO[1])), min(height, round(width * _RATIO[1]))
    left, top = (width - wide) // 2, (height - high) // 2
    return left, top, left + wide, top + high
