"""Trainings that two processes do as well as one; torchrun starts this file once for each of two processes.

torchrun --standalone --nproc-per-node 2 tests/distributed_cases.py PIPELINE FOLDER
"""

import contextlib
import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from training_cases import KilledError, Recorder, kill_after, mislabelled, timeless

from compress import CompressError, load_pipeline
from compress.config import DistillConfig, TrainConfig
from compress.data.load import load_data
from compress.distributed import ALONE, joined
from compress.models.factory import Arch, create
from compress.training import Workplace, fit
from compress.training.taught import TeacherModel, objective_of

KD = {"kd": {"temperature": 4.0, "weight": 0.9}}
LABELS = {"labels": {"weight": 0.1}}
COMMON = {"epochs": 3, "batch_size": 16, "learning_rate": 0.05, "precision": "fp32", "batchnorm": "frozen"}


class Wasteful(nn.Module):
    """Has a layer that its answer does not depend on."""

    def __init__(self, model):
        super().__init__()
        self.model, self.idle = model, nn.Parameter(torch.ones(3))

    def forward(self, x):
        return self.model(x)


class Drawing(nn.Module):
    """Draws a number in each step of a training, as dropout does, and remembers it."""

    def __init__(self, model):
        super().__init__()
        self.model, self.drawn = model, []

    def forward(self, x):
        if self.training:
            self.drawn.append(torch.rand(()).item())
        return self.model(x)


@dataclass(frozen=True)
class Case:
    """A training of the tiny model."""

    settings: dict = field(default_factory=dict)
    losses: tuple = ()
    """Of a student; labels alone where there are none."""
    peers: int = 0
    wasteful: bool = False
    misleading: bool = False
    """Whether validation gets worse from the first epoch on."""
    killed: bool = False
    """Whether it is killed after the first epoch, and goes on."""
    strangers: bool = False
    """Whether the second process begins with other weights."""
    unlike: bool = False
    """Whether the second process computes with more threads, as on another machine."""
    draws: bool = False
    """Whether the model draws numbers while it trains."""


CASES = {
    "labels": Case(),
    "uneven": Case({"batch_size": 15}),
    "parts": Case({"accumulate": 2, "optimizer": "adamw", "learning_rate": 0.003, "gradient_clip": 0.5}),
    "average": Case({"ema": 0.9, "schedule": "cosine", "warm_up": 0.2}),
    "killed": Case({"ema": 0.9, "schedule": "cosine", "warm_up": 0.2}, killed=True),
    "idle_layer": Case(wasteful=True),
    "taught": Case({}, (KD, LABELS)),
    "cached": Case({"cache": {"views": 2}}, (KD, LABELS)),
    "cached_in_parts": Case({"cache": {"views": 2}, "accumulate": 3}, (KD, LABELS)),
    "peers": Case({}, ({"labels": {}}, {"kd": {"from": "peers", "temperature": 1.0}}), peers=1),
    "own_average": Case({"ema_teacher": 0.9}, ({"labels": {}}, {"kd": {"from": "ema", "temperature": 1.0}})),
    "stops_early": Case({"epochs": 6, "early_stopping": 2}, misleading=True),
    "unlike": Case({"cache": {"views": 2}}, (KD, LABELS), killed=True, unlike=True),
}
"""Each process ends with the weights that one alone would have, but for rounding."""

OWN_STATISTICS = {
    "statistics": Case({"batchnorm": "train", "ema": 0.9}),
    "blended": Case({"batchnorm": "train", "mixup": 0.4}),
    "draws": Case(draws=True),
}
"""Processes end with the same weights, but not with those of one alone."""

FAILING = {
    "astray": Case({"learning_rate": 1e30}),
    "too_many": Case({"batch_size": 3}),
    "strangers": Case(strangers=True),
}


def train(case, pipeline, folder, group=ALONE):
    """The weights and rows that a case ends with."""
    dataset = load_data(pipeline.data, pipeline.seed)
    data = mislabelled(dataset.for_decisions()) if case.misleading else dataset.for_decisions()
    arch = Arch(pipeline.model.factory)
    seed = 7 if case.strangers and not group.leads else 1
    settings = {**COMMON, **case.settings}

    def once(progress):
        model = create(arch, seed=seed)
        model = Wasteful(model) if case.wasteful else Drawing(model) if case.draws else model
        place = Workplace("cpu", 3, folder, progress, cache=folder / "teacher", group=group)
        if case.losses:
            student = {"factory": pipeline.model.factory}
            settings.update(student=student, losses=case.losses, peers=[student] * case.peers)
            config = DistillConfig.model_validate_json(json.dumps(settings))
            teacher = TeacherModel(create(arch, seed=9), {"teacher": "made from seed 9"})
            peers = [create(arch, seed=20 + number) for number in range(case.peers)]
            teachers = [teacher] if any("from" not in term.get("kd", {"from": 0}) for term in case.losses) else []
            objective = objective_of(model, config, data, place, at="distill", teachers=teachers, peers=peers)
        else:
            config = TrainConfig.model_validate_json(json.dumps(settings))
            objective = objective_of(model, config, data, place, at="train")
        return model, fit(objective, data, config, place)

    recorder, threads = Recorder(), torch.get_num_threads()
    torch.set_num_threads(threads + (case.unlike and not group.leads))
    if case.killed:
        with contextlib.suppress(KilledError):
            once(kill_after(1))
    model, rows = once(recorder)
    torch.set_num_threads(threads)
    return model.state_dict(), timeless(rows), [*recorder.notes, *map(str, getattr(model, "drawn", ()))]


def main(pipeline, folder, *names):
    """Train the cases with these names, or all of them; each process writes what it ended with."""
    torch.set_num_threads(1)
    pipeline = load_pipeline(pipeline)
    with joined() as group:
        known = CASES | OWN_STATISTICS | FAILING
        for name in names or known:
            case, out = known[name], Path(folder) / f"{name}-{group.shard.rank}"
            try:
                weights, rows, notes = train(case, pipeline, Path(folder) / "work" / name, group)
            except CompressError as error:
                out.with_suffix(".txt").write_text(str(error))
                continue
            save_file({key: tensor.contiguous() for key, tensor in weights.items()}, out.with_suffix(".safetensors"))
            out.with_suffix(".json").write_text(json.dumps({"rows": rows, "notes": notes}))
        if set(names or known) & set(FAILING):
            # Threads of a broken connection may outlive what they work for, and abort the process on its way out.
            os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
