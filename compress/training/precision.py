"""What a model computes in while it trains."""

from __future__ import annotations

import torch

from compress.errors import TrainingError
from compress.machine import has_fast_bfloat16

_LEAST_SCALE = 2.0**-20


def resolved_precision(precision: str, device: str) -> str:
    """'fp32', 'bf16' or 'fp16': what 'auto' means on a device ('cpu' or 'cuda')."""
    if precision != "auto":
        return precision
    if device == "cpu":
        return "bf16" if has_fast_bfloat16() else "fp32"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"


class Arithmetic:
    """Autocast, and the factor of the loss that keeps small gradients from vanishing in fp16."""

    def __init__(self, precision: str, device: str) -> None:
        """Take 'auto', 'fp32', 'bf16' or 'fp16' on 'cpu' or 'cuda'.

        Raises:
            TrainingError: for fp16 on the CPU.
        """
        self.precision = resolved_precision(precision, device)
        if self.precision == "fp16" and device == "cpu":
            raise TrainingError("precision: fp16 needs a CUDA device, but training is on the CPU; use bf16 or fp32")
        self._device = device
        self.scaler = torch.amp.GradScaler(device, enabled=self.precision == "fp16")

    def autocast(self) -> torch.autocast:
        """What the forward pass of a step runs in."""
        dtype = torch.float16 if self.precision == "fp16" else torch.bfloat16
        return torch.autocast(self._device, dtype, enabled=self.precision != "fp32")

    def lost(self) -> bool:
        """Whether gradients overflowed so often that the factor is next to nothing; makes a GPU wait."""
        return self.scaler.is_enabled() and self.scaler.get_scale() < _LEAST_SCALE
