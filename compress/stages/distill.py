"""`distill`: a smaller student learns from the model that comes in (Hinton et al. 2015, arXiv:1503.02531)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from compress.checkpoint import Checkpoint, Draft
from compress.config import DistillConfig, ModelConfig, imitates
from compress.models.cost import parameters
from compress.models.factory import Arch
from compress.models.source import make_model
from compress.names import placeless
from compress.provenance import identity
from compress.seeds import derive_seed
from compress.stages.base import Context, tell_of_layers, tell_of_views, told_losses
from compress.training import fit
from compress.training.state import digest_of
from compress.training.taught import TeacherModel, objective_of


def run(parent: Checkpoint, config: DistillConfig, context: Context) -> Draft:
    """Train the student; keeps the epoch that is best on validation. The student replaces the teacher.

    Peers learn with it, and further teachers answer with the one that comes in; none of them goes on.
    """
    teachers = _teachers(parent, config, context)
    student = _made(config.student, derive_seed(context.seed, "student"), "distill.student", context)
    if parameters(student) >= parameters(teachers[0].model):
        context.warn(
            f"the student has {parameters(student):,} parameters, its teacher {parameters(teachers[0].model):,}: "
            "nothing gets smaller"
        )
    peers = [
        _made(peer, derive_seed(context.seed, "peer", number), f"distill.peers.{number}", context)
        for number, peer in enumerate(config.peers)
    ]
    _tell(config, teachers, context)
    objective = objective_of(
        student,
        config,
        context.data,
        context.workplace,
        at="distill",
        teachers=teachers if any(imitates(entry, "teacher") for entry in config.losses) else (),
        average=config.ensemble.average if config.ensemble is not None else "probabilities",
        peers=peers,
    )
    tell_of_layers(objective, context)
    training = fit(objective, context.data, config, context.workplace)
    return Draft(Arch(config.student.factory, config.student.kwargs), (), student, training=training)


def _teachers(parent: Checkpoint, config: DistillConfig, context: Context) -> list[TeacherModel]:
    """The model that comes in, and all others."""
    if config.ensemble is None:
        return [context.teacher(parent)]
    teachers = [context.teacher(parent, config.ensemble.share)]
    for number, other in enumerate(config.ensemble.others):
        seed = derive_seed(context.seed, "teacher", number)
        model = _made(other, seed, f"distill.ensemble.others.{number}", context)
        settings = identity(other.model_copy(update={"share": 1.0}))
        # Own code may load weights that no setting names.
        known = {"teacher": settings, "weights": digest_of(model), "seed": seed, **context.answers_key}
        teachers.append(TeacherModel(model, known, other.share))
    return teachers


def _made(config: ModelConfig, seed: int, at: str, context: Context) -> nn.Module:
    return make_model(Arch(config.factory, config.kwargs), config.weights, seed, at=at, note=context.note)


def _tell(config: DistillConfig, teachers: Sequence[TeacherModel], context: Context) -> None:
    """Say what is not as usual: who teaches, and by which losses."""
    for line in told_losses(config):
        context.note(line)
    tell_of_views(config, context)
    if not any(imitates(entry, "teacher") for entry in config.losses):
        context.note("no term of the loss imitates the model that comes in: it teaches nothing")
    if config.ensemble is not None:
        total = sum(each.share for each in teachers)
        names = ["the model that comes in", *(placeless(other.factory) for other in config.ensemble.others)]
        parts = (f"{100 * each.share / total:.0f} % {name}" for each, name in zip(teachers, names, strict=True))
        context.note(f"teachers, {config.ensemble.average} averaged: {', '.join(parts)}")
    if config.peers:
        context.note(f"peers: {', '.join(placeless(peer.factory) for peer in config.peers)}")
    starts = [each for each in (config.student, *config.peers) if each.weights is not None]
    if any(each in starts[:place] for place, each in enumerate(starts)):
        context.warn("some of student and peers begin with the same weights: they have little to learn from each other")
