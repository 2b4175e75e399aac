"""A model ready to use: made by its factory, filled with its weights."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from compress.models.factory import Arch, create
from compress.models.weights import load_state, published_weights, read_weights
from compress.names import is_weights_file


def make_model(arch: Arch, weights: str | None, seed: int) -> nn.Module:
    """A model in evaluation mode on the CPU.

    Args:
        arch: its factory and arguments.
        weights: a file, or the name of published weights; None for a seeded initialisation.
        seed: of the initialisation.

    Raises:
        ModelError: where the factory does not exist or the weights do not fit.
    """
    model = create(arch, seed=seed)
    if weights is not None:
        state = read_weights(Path(weights)) if is_weights_file(weights) else published_weights(arch, weights)
        load_state(model, state, f"model.weights: {Path(weights).name}")
    return model.eval()
