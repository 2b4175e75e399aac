"""The model as it comes: factory and weights become the first checkpoint."""

from __future__ import annotations

from compress.checkpoint import Draft
from compress.config import ModelConfig
from compress.models.factory import Arch
from compress.models.source import make_model


def make(config: ModelConfig, seed: int) -> Draft:
    """The source model, with its weights or, where it has none, a seeded initialisation.

    Raises:
        ModelError: where the factory does not exist or the weights do not fit.
    """
    arch = Arch(config.factory, config.kwargs)
    notes: list[str] = []
    model = make_model(arch, config.weights, seed, note=notes.append)
    return Draft(arch, (), model, notes=tuple(notes))
