"""`distill`: a smaller student learns from the model that comes in (Hinton et al. 2015, arXiv:1503.02531)."""

from __future__ import annotations

from compress.checkpoint import Checkpoint, Draft
from compress.config import DistillConfig
from compress.models.cost import parameters
from compress.models.factory import Arch
from compress.models.source import make_model
from compress.seeds import derive_seed
from compress.stages.base import Context
from compress.training import fit


def run(parent: Checkpoint, config: DistillConfig, context: Context) -> Draft:
    """Train the student; keeps the epoch that is best on validation. The student replaces the teacher."""
    teacher = parent.build(context.trusted)
    arch = Arch(config.student.factory, config.student.kwargs)
    student = make_model(
        arch, config.student.weights, derive_seed(context.seed, "student"), at="distill.student", note=context.note
    )
    if parameters(student) >= parameters(teacher):
        context.warn(
            f"the student has {parameters(student):,} parameters, its teacher {parameters(teacher):,}: nothing gets smaller"
        )
    training = fit(student, context.data, config.losses, teacher, config, context.workplace)
    return Draft(arch, (), student, training=training)
