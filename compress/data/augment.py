"""Random shift and mirroring of a whole batch at once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from compress.config.data import Augment


@dataclass(frozen=True)
class Moves:
    """What happens to each of n images: shifted by (down, right) pixels within ±crop, then mirrored or not."""

    down: Int64[Tensor, " n"]
    right: Int64[Tensor, " n"]
    mirror: Bool[Tensor, " n"]

    def of(self, chosen: Int64[Tensor, " m"]) -> Moves:
        """The moves of the images at `chosen`."""
        return Moves(self.down[chosen], self.right[chosen], self.mirror[chosen])


def draw_moves(n: int, augment: Augment, generator: torch.Generator) -> Moves:
    """Uniform shifts and fair mirrorings for n images, from `generator` alone."""
    crop = augment.crop
    down, right = torch.randint(-crop, crop + 1, (2, n), generator=generator)
    mirror = torch.rand(n, generator=generator) < (0.5 if augment.flip else 0.0)
    return Moves(down, right, mirror)


def move(images: Float[Tensor, "n c h w"], moves: Moves) -> Float[Tensor, "n c h w"]:
    """Shift and mirror images; what a shift uncovers repeats the image's edge.

    A constant would put a frame around training images that no other image has: grey around digits on black, for one.

    The content of an image moves `down` pixels down and `right` pixels to the right; then, where `mirror` is set, it
    is turned left to right.
    """
    n, channels, height, width = images.shape
    rows = (torch.arange(height) - moves.down[:, None]).clamp(0, height - 1)
    columns = torch.arange(width).expand(n, width)
    columns = torch.where(moves.mirror[:, None], width - 1 - columns, columns) - moves.right[:, None]
    columns = columns.clamp(0, width - 1)
    # Two gathers along one axis each are three times as fast as one index with four tensors.
    picked = images.gather(2, rows[:, None, :, None].expand(n, channels, height, width))
    return picked.gather(3, columns[:, None, None, :].expand(n, channels, height, width))
