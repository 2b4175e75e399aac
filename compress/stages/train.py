"""`train`: supervised training of the model that comes in."""

from __future__ import annotations

from compress.checkpoint import Checkpoint, Draft
from compress.config import TrainConfig
from compress.stages.base import Context
from compress.training import fit


def run(parent: Checkpoint, config: TrainConfig, context: Context) -> Draft:
    """Train on the labels; keeps the epoch that is best on validation."""
    model = parent.build(context.trusted)
    training = fit(model, context.data, config.losses, None, config, context.workplace)
    return Draft(parent.arch, parent.edits, model, training=training)
