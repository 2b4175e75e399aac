"""In which order the numbers of an image lie in memory."""

from __future__ import annotations

import torch
from torch import Tensor

from compress.data.base import Batch


def laid_out(batch: Batch, layout: torch.memory_format) -> Batch:
    """The batch with its 4-d float inputs in this layout: a model, and a teacher asked beside it, get the same bits."""
    return batch._replace(inputs=tuple(_laid_out(tensor, layout) for tensor in batch.inputs))


def _laid_out(tensor: Tensor, layout: torch.memory_format) -> Tensor:
    is_image_like = tensor.dim() == 4 and tensor.is_floating_point()
    return tensor.contiguous(memory_format=layout) if is_image_like else tensor
