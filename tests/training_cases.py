"""What the tests of training share: a short training, and looks at what came of it."""

import dataclasses
import itertools

import torch

from compress.config import LabelLossConfig, LossEntry, TrainingConfig
from compress.data.base import WHOLE, Batch, DecisionData, Input
from compress.events import Silent
from compress.training import Objective, OneTeacher, Workplace, fit

LABELS = (LossEntry(labels=LabelLossConfig(weight=1.0)),)


class Recorder(Silent):
    """Keeps epochs, notes and what was said of the work; calls `then` after each epoch."""

    def __init__(self, then=lambda result: None):
        self.epochs, self.notes, self.warnings, self.work_done, self.then = [], [], [], [], then

    def work(self, what, done, total, detail=""):
        self.work_done.append((what, done, total, detail))

    def epoch(self, result):
        self.epochs.append(result)
        self.then(result)

    def note(self, text):
        self.notes.append(text)

    def warn(self, text):
        self.warnings.append(text)


class KilledError(Exception):
    """Stands for whatever ends a process between two epochs."""


def kill_after(epoch):
    def then(result):
        if result.epoch == epoch:
            raise KilledError

    return Recorder(then)


class Trainer:
    """Trains models in place, each in a folder of its own unless told otherwise."""

    def __init__(self, folder, data):
        self.folder, self.data, self.count = folder, data, itertools.count()

    def __call__(
        self,
        model,
        *,
        scratch=None,
        seed=0,
        losses=LABELS,
        teacher=None,
        data=None,
        progress=None,
        objective=None,
        **settings,
    ):
        """Rows of a training of `model`; as short and exact as can be unless the settings say otherwise."""
        settings = {"epochs": 2, "batch_size": 16, "learning_rate": 0.05, "precision": "fp32", **settings}
        place = Workplace("cpu", seed, scratch or self.folder / f"scratch{next(self.count)}", progress or Silent())
        objective = objective or Objective(model, losses, None if teacher is None else OneTeacher(teacher))
        return fit(objective, data or self.data, TrainingConfig(**settings), place)


def bits(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(first, second):
    return all(torch.equal(first[name], second[name]) for name in first.keys() | second.keys())


def timeless(rows):
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def best_epoch(rows):
    return max(rows, key=lambda row: (row["validation_percent"], -row["validation_loss"]))["epoch"]


def mislabelled(data):
    """The same data with validation labels that get worse the more a model learns."""
    validation = data.train.take(range(len(data.train)))
    wrong = (validation.labels + 1) % len(data.classes)
    batches = validation.batches

    class Wrong:
        name, labels = "validation", wrong

        def __len__(self):
            return len(wrong)

        def batches(self, batch_size, *, shard=WHOLE):
            return (batch._replace(labels=wrong[batch.indices]) for batch in batches(batch_size, shard=shard))

    return dataclasses.replace(data, validation=Wrong())


class Vectors:
    """A split of vectors, in order whatever the seed; keeps what it was asked for."""

    def __init__(self, inputs, labels, name="train"):
        self.inputs, self.labels, self.name, self.asked = inputs, labels, name, []

    def __len__(self):
        return len(self.labels)

    repeats = True

    def batches(self, batch_size, *, seed=None, drop_last=False, view=None, shard=None):
        self.asked.append({"seed": seed, "view": view})
        for start in range(0, len(self), batch_size):
            chosen = torch.arange(start, min(start + batch_size, len(self)))
            if drop_last and len(chosen) < batch_size:
                return
            yield Batch((self.inputs[chosen],), self.labels[chosen], chosen, view)


def vectors(n=48, size=5, classes=3, seed=0, dtype=torch.float32):
    """Data of a few Gaussian clouds, the same for training and validation."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % classes
    centres = torch.randn(classes, size, generator=generator)
    inputs = (centres[labels] + torch.randn(n, size, generator=generator)).to(dtype)
    names = tuple(str(each) for each in range(classes))
    return DecisionData(names, (Input("x", (size,)),), Vectors(inputs, labels), Vectors(inputs, labels, "validation"))


def linear(size=5, classes=3, seed=0, dtype=torch.float32):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return torch.nn.Linear(size, classes).to(dtype)
