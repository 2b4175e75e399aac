"""A tiny model and a tiny data set, and a workshop that runs single stages on them as the pipeline would."""

import json
from dataclasses import dataclass
from pathlib import Path

import hypothesis
import jaxtyping
import numpy as np
import pytest

from compress import load_pipeline

# Shapes and types of the mathematics are checked in every test; this comes before their first import.
SHAPED = [
    "attacks",
    "averages",
    "corruptions",
    "cutting",
    "groups",
    "importance",
    "losses",
    "lowrank",
    "mixing",
    "rank_allocation",
    "ranking",
    "robustness",
    "schedules",
    "seen",
    "sensitivity",
    "sparsity",
    "spatial",
    "trial",
    "tucker",
    "whitening",
]
jaxtyping.install_import_hook([f"compress.methods.{name}" for name in SHAPED], "beartype.beartype")
# The same examples every time, and no failures because a machine is busy.
hypothesis.settings.register_profile("steady", derandomize=True, deadline=None)
hypothesis.settings.load_profile("steady")

MODEL = '''
"""Small networks of the user's own, for inputs (1, 12, 8)."""

import os
import signal

import torch
from torch import nn


class Tiny(nn.Module):
    def __init__(self, num_classes=4, width=16, channels=1, dropout=0.0):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.bn2 = nn.BatchNorm2d(2 * width)
        self.conv3 = nn.Conv2d(2 * width, 2 * width, 3, padding=1)
        self.dropout = nn.Dropout(dropout)
        self.hidden = nn.Linear(2 * width, 2 * width)
        self.head = nn.Linear(2 * width, num_classes)

    def forward(self, x):
        x = self.bn1(self.conv1(x)).relu()
        x = self.bn2(self.conv2(x)).relu()
        x = self.conv3(x).relu().mean((2, 3))
        return self.head(self.hidden(self.dropout(x)).relu())


class Separable(nn.Module):
    """Depthwise and pointwise convolutions, then a flattened map."""

    def __init__(self, num_classes=4):
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3, stride=2, padding=1)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.pointwise = nn.Conv2d(16, 32, 1)
        self.head = nn.Linear(32 * 6 * 4, num_classes)

    def forward(self, x):
        x = self.norm(self.depthwise(self.stem(x).relu())).relu()
        return self.head(self.pointwise(x).relu().flatten(1))


class Branches(nn.Module):
    """Two convolutions whose channels are concatenated."""

    def __init__(self, num_classes=4):
        super().__init__()
        self.left = nn.Conv2d(1, 24, 3, padding=1)
        self.right = nn.Conv2d(1, 24, 5, padding=2)
        self.join = nn.Conv2d(48, 32, 3, stride=2, padding=1)
        self.head = nn.Linear(32, num_classes)

    def forward(self, x):
        x = torch.cat([self.left(x).relu(), self.right(x).relu()], 1)
        return self.head(self.join(x).relu().mean((2, 3)))


class Mortal(Tiny):
    """Kills its process in training step DIE_AT."""

    steps = 0

    def forward(self, x):
        if self.training:
            self.steps += 1
            if self.steps == int(os.environ.get("DIE_AT", 0)):
                os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(x)


class Stubborn(Tiny):
    def forward(self, x):
        raise ValueError("no forward today")


make, separable, branches, mortal, stubborn = Tiny, Separable, Branches, Mortal, Stubborn
'''
SHAPE, CLASSES = (12, 8, 1), 4


def images(n, seed, noise=60.0):
    """Noisy patterns, one per class: easy to learn, not trivial."""
    patterns = np.random.default_rng(0).uniform(0, 255, (CLASSES, *SHAPE))
    labels = np.arange(n) % CLASSES
    noisy = patterns[labels] + np.random.default_rng(seed).normal(0, noise, (n, *SHAPE))
    return noisy.clip(0, 255).astype(np.uint8), labels


def write_arrays(root, **splits):
    root.mkdir(parents=True, exist_ok=True)
    for name, (inputs, labels) in splits.items():
        np.save(root / f"{name}_images.npy", inputs)
        np.save(root / f"{name}_labels.npy", labels)
    return root


@dataclass
class TinyFiles:
    """Files of a small project: `model.py` and a data set with its own validation split."""

    root: Path

    @property
    def factory(self):
        return self.named("make")

    def named(self, name):
        """A factory in `model.py`."""
        return f"{self.root / 'model.py'}:{name}"

    @property
    def data(self):
        return {
            "kind": "arrays",
            "root": str(self.root / "data"),
            "classes": ["north", "east", "south", "west"],
            "validation": {"from": "given"},
        }

    def pipeline(self, folder, *stages, overrides=(), **settings):
        """A pipeline file in `folder`, loaded; without latency, on one thread."""
        document = {
            "name": "tiny",
            "device": "cpu",
            "threads": 1,
            "data": self.data,
            "model": {"factory": self.factory},
            "stages": list(stages),
            "bench": {"latency": None},
            **settings,
        }
        path = folder / "pipeline.yaml"
        path.write_text(json.dumps(document, indent=1))
        return load_pipeline(path, overrides)


@pytest.fixture
def one_thread():
    """Tiny tensors gain nothing from threads and lose much on a busy machine."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    root = tmp_path_factory.mktemp("tiny")
    (root / "model.py").write_text(MODEL)
    write_arrays(root / "data", train=images(160, 1), validation=images(96, 2), test=images(96, 3))
    return TinyFiles(root)


@pytest.fixture(scope="session")
def tiny_data(tiny, tmp_path_factory):
    from compress.data.load import load_data

    return load_data(tiny.pipeline(tmp_path_factory.mktemp("pipeline")).data, 0)


@dataclass
class Workshop:
    """Runs one stage after the other; every checkpoint is read back from disk."""

    folder: Path
    dataset: object
    factory: str
    trusted: frozenset = frozenset()
    count: int = 0

    def _keep(self, draft, history):
        from compress import checkpoint

        data = self.dataset
        self.count += 1
        path = self.folder / f"{self.count:03d}"
        checkpoint.save(path, draft, inputs=data.inputs, classes=data.classes, history=history, key={})
        return checkpoint.load(path)

    def source(self, factory=None, seed=0, **kwargs):
        from compress.config import ModelConfig
        from compress.manifest import HistoryEntry
        from compress.stages import source

        draft = source.make(ModelConfig(factory=factory or self.factory, kwargs=kwargs), seed)
        return self._keep(draft, (HistoryEntry(stage="source", parent=None, settings={}, seconds=0.0),))

    def draft(self, parent, kind, *, seed=0, reference=None, data=None, progress=None, timer=None, **settings):
        """What a stage hands back, and the context it was given; `prune` and `factorize` may be given a timer of their own."""
        from compress.config import StageEntry
        from compress.events import Silent
        from compress.stages import STAGES
        from compress.stages.base import Context

        if kind == "factorize":  # no decision by the clock, unless a test is about it
            settings = {"faster_by": 0.0, **settings}
        entry = StageEntry.model_validate_json(json.dumps({kind: settings}))
        context = Context(
            data=data or self.dataset.for_decisions(),
            reference=reference or parent,
            device="cpu",
            threads=1,
            seed=seed,
            scratch=self.folder / "scratch",
            progress=progress or Silent(),
            trusted=self.trusted,
            parent_accuracy={"validation": {"percent": 90.0}, "test": {"percent": 89.0}},
        )
        own = {} if timer is None else {"timer": timer}
        return STAGES[kind].load()(parent, entry.settings, context, **own), context

    def run(self, parent, kind, **options):
        """The checkpoint that a stage makes of `parent`."""
        import shutil

        from compress.manifest import HistoryEntry

        draft, context = self.draft(parent, kind, **options)
        shutil.rmtree(self.folder / "scratch", ignore_errors=True)
        entry = HistoryEntry(
            stage=kind,
            parent=parent.digest,
            settings={},
            seconds=0.0,
            notes=tuple(context.notes),
            warnings=tuple(context.warnings),
            training=draft.training,
        )
        return self._keep(draft, (*parent.history, entry))

    def build(self, checkpoint):
        return checkpoint.build(self.trusted)


@pytest.fixture
def workshop(tiny, tiny_data, tmp_path):
    return make_workshop(tmp_path / "checkpoints", tiny, tiny_data)


def make_workshop(folder, tiny, dataset):
    return Workshop(
        folder, dataset, tiny.factory, frozenset({tiny.factory, tiny.named("separable"), tiny.named("branches")})
    )


@pytest.fixture(scope="session")
def shared_workshop(tiny, tiny_data, tmp_path_factory):
    """A workshop for the whole session, for checkpoints that many tests start from."""
    return make_workshop(tmp_path_factory.mktemp("checkpoints"), tiny, tiny_data)


@pytest.fixture(scope="session")
def trained(shared_workshop):
    """The tiny model, trained to about 97 % on validation."""
    settings = {"epochs": 3, "batch_size": 16, "optimizer": "adamw", "learning_rate": 0.01}
    return shared_workshop.run(shared_workshop.source(), "train", **settings)
