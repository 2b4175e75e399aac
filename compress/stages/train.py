"""`train`: supervised training of the model that comes in."""

from __future__ import annotations

from compress.checkpoint import Checkpoint, Draft
from compress.config import TrainConfig
from compress.stages.base import Context, told_losses
from compress.training import fit
from compress.training.taught import objective_of


def run(parent: Checkpoint, config: TrainConfig, context: Context) -> Draft:
    """Train on the labels; keeps the epoch that is best on validation."""
    model = parent.build(context.trusted)
    for line in told_losses(config):
        context.note(line)
    objective = objective_of(model, config, context.data, context.workplace, at="train")
    training = fit(objective, context.data, config, context.workplace)
    return Draft(parent.arch, parent.edits, model, training=training)
