"""Each setting of the engine does what it says, seen from outside: by weights, rows, and what a model is given."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from training_cases import LABELS, Recorder, Trainer, Vectors, bits, linear, mislabelled, same, timeless, vectors

from compress.config import RecoveryConfig, TeacherCacheConfig, TrainingConfig
from compress.data.base import Batch, DecisionData, Input
from compress.errors import StageError, TrainingError
from compress.models.factory import Arch, create
from compress.training import Objective, OneTeacher, Workplace, evaluate, fit
from compress.training.mixer import Mixer
from compress.training.optimizers import optimizer_of

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def make(tiny):
    return lambda seed=0, **kwargs: create(Arch(tiny.factory, kwargs), seed=seed)


@pytest.fixture
def train(tmp_path, tiny_data):
    return Trainer(tmp_path, tiny_data.for_decisions())


class Watched(Objective):
    """Keeps copies of the model's tensors after each step, and the batches it was given."""

    def __init__(self, model, losses=LABELS):
        super().__init__(model, losses, None)
        self.steps, self.batches = [], []

    def forward(self, batch, position):
        self.batches.append(batch)
        return super().forward(batch, position)

    def after_step(self):
        super().after_step()
        self.steps.append(bits(self.model))


# Optimizers


@pytest.mark.parametrize("kind", ["sgd", "adam", "adamw", "rmsprop"])
def test_each_optimizer_steps_as_in_a_loop_written_by_hand(train, kind):
    data, expected, model = vectors(), linear(), linear()
    rate, momentum, decay = 0.01, 0.8, 0.1
    groups = [{"params": [expected.weight], "weight_decay": decay}, {"params": [expected.bias], "weight_decay": 0.0}]
    optimizer = {
        "sgd": lambda: torch.optim.SGD(groups, rate, momentum, nesterov=True),
        "adam": lambda: torch.optim.Adam(groups, rate, (momentum, 0.999)),
        "adamw": lambda: torch.optim.AdamW(groups, rate, (momentum, 0.999)),
        "rmsprop": lambda: torch.optim.RMSprop(groups, rate, momentum=momentum),
    }[kind]()
    for batch in data.train.batches(16):
        optimizer.zero_grad()
        F.cross_entropy(expected(batch.inputs[0]), batch.labels).backward()
        optimizer.step()
    settings = {"learning_rate": rate, "momentum": momentum, "weight_decay": decay, "schedule": "constant"}
    train(model, data=data, epochs=1, optimizer=kind, **settings)
    assert same(bits(model), bits(expected))


class Mixture(nn.Module):
    """Norms of all kinds, a bias with three axes, a temperature, an embedding."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(4, 6)
        self.convolution = nn.Conv1d(6, 6, 1)
        self.plane = nn.LayerNorm((6, 2))
        self.norms = nn.ModuleList([nn.BatchNorm1d(6), nn.GroupNorm(2, 6), nn.InstanceNorm1d(6, affine=True)])
        self.rms = nn.RMSNorm((6, 2))
        self.shift = Shift()
        self.temperature = nn.Parameter(torch.ones(()))
        self.frozen = nn.Linear(2, 2).requires_grad_(False)


class Shift(nn.Module):
    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(1, 6, 1))


def test_weight_decay_spares_norms_and_biases_of_any_shape():
    model = Mixture()
    names = {parameter: name for name, parameter in model.named_parameters()}
    decayed, spared = optimizer_of(model, TrainingConfig(weight_decay=0.1)).param_groups
    assert [decayed["weight_decay"], spared["weight_decay"]] == [0.1, 0.0]
    assert {names[each] for each in decayed["params"]} == {"embedding.weight", "convolution.weight"}
    assert len(spared["params"]) == len([each for each in model.parameters() if each.requires_grad]) - 2


def test_a_model_without_anything_to_train_is_refused(make, train):
    with pytest.raises(TrainingError, match=r"no parameter .* can be trained"):
        train(make().requires_grad_(False))


def test_gradients_are_clipped(make, train):
    moved = []
    for clip in (None, 1e-3):
        model = make()
        before = bits(model)
        train(model, epochs=1, batch_size=160, gradient_clip=clip, momentum=0.0, weight_decay=0.0, schedule="constant")
        after = {name: parameter.detach() for name, parameter in model.named_parameters()}
        moved.append(sum(float((after[name] - before[name]).square().sum()) for name in after) ** 0.5)
    assert moved[1] == pytest.approx(1e-3 * 0.05, rel=0.01)
    assert moved[0] > 10 * moved[1]


# Learning rates


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"schedule": "constant"}, [1, 1, 1, 1]),
        ({"schedule": "constant", "warm_up": 0.5}, [3 / 7, 6 / 7, 1, 1]),  # 12 steps, of which 6 rise
        ({"schedule": "step", "milestones": (0.25, 0.75), "gamma": 0.5}, [1, 0.5, 0.5, 0.25]),
        ({"schedule": "step", "milestones": (0.5,), "gamma": 0.1, "warm_up": 0.25}, [3 / 4, 1, 0.1, 0.1]),
        ({"schedule": "cosine"}, [(1 + math.cos(math.pi * step / 11)) / 2 for step in (2, 5, 8, 11)]),
    ],
)
def test_rows_show_the_rate_of_the_last_step_of_each_epoch(train, settings, expected):
    rows = train(linear(), data=vectors(), epochs=4, learning_rate=0.2, **settings)
    assert [row["learning_rate"] for row in rows] == pytest.approx([0.2 * each for each in expected], abs=2.1e-5)


# Parts of a batch


@pytest.mark.parametrize("clip", [None, 0.1])
def test_a_step_in_parts_is_the_same_step(train, clip):
    settings = {"data": vectors(60), "batch_size": 10, "momentum": 0.9, "gradient_clip": clip}
    whole, parts = Watched(linear()), Watched(linear())
    rows = train(whole.model, objective=whole, **settings)
    rows_of_parts = train(parts.model, objective=parts, accumulate=4, **settings)
    assert [len(batch.labels) for batch in parts.batches[:4]] == [3, 3, 2, 2]
    assert torch.cat([batch.indices for batch in parts.batches[:4]]).tolist() == list(range(10))
    for name, tensor in bits(whole.model).items():
        assert torch.allclose(tensor, bits(parts.model)[name], rtol=1e-5, atol=1e-7)
    for one, other in zip(rows, rows_of_parts, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-6)


def test_a_split_smaller_than_the_batch_has_fewer_parts(train):
    watched = Watched(linear())
    train(watched.model, objective=watched, data=vectors(6), batch_size=64, accumulate=16, epochs=1)
    assert [len(batch.labels) for batch in watched.batches] == [2, 2, 2]


# The average of the weights


def test_the_average_is_the_recurrence_and_what_is_kept(make, train):
    watched, decay = Watched(make()), 0.8
    expected = bits(watched.model)
    rows = train(watched.model, objective=watched, epochs=1, ema=decay)
    for step, weights in enumerate(watched.steps):
        kept = min(decay, (1 + step) / (10 + step))
        for name, tensor in weights.items():
            mean = kept * expected[name].double() + (1 - kept) * tensor.double()
            expected[name] = mean if tensor.is_floating_point() else tensor
    for name, tensor in bits(watched.model).items():
        assert torch.allclose(tensor.double(), expected[name].double(), rtol=1e-5, atol=1e-7), name
    assert int(watched.model.bn1.num_batches_tracked) == 10
    assert not torch.equal(watched.model.bn1.running_mean, watched.steps[-1]["bn1.running_mean"])
    loss, correct = evaluate(watched.model, train.data.validation, "cpu")
    assert loss == pytest.approx(rows[0]["validation_loss"])
    assert 100 * correct / len(train.data.validation) == rows[0]["validation_percent"]


def test_the_average_does_not_disturb_what_it_follows(make, train):
    alone, followed = Watched(make()), Watched(make())
    train(alone.model, objective=alone, epochs=3)
    train(followed.model, objective=followed, epochs=3, ema=0.9)
    assert all(same(one, other) for one, other in zip(alone.steps, followed.steps, strict=True))


# Early stopping


def test_training_stops_when_nothing_gets_better(make, train):
    recorder, model, straight = Recorder(), make(), make()
    settings = {"schedule": "constant", "data": mislabelled(train.data)}
    rows = train(model, epochs=8, early_stopping=2, progress=recorder, **settings)
    best = max(rows, key=lambda row: (row["validation_percent"], -row["validation_loss"]))["epoch"]
    assert len(rows) == best + 2 < 8
    assert recorder.notes == [f"stops after epoch {best + 2} of 8: the best was epoch {best}"]
    assert timeless(rows) == timeless(train(straight, epochs=8, **settings)[: len(rows)])
    assert same(bits(model), bits(straight))


def test_patience_that_is_not_used_up_changes_nothing(train):
    plain, patient, recorder = linear(), linear(), Recorder()
    rows = train(plain, data=vectors(), epochs=3)
    assert timeless(rows) == timeless(train(patient, data=vectors(), epochs=3, early_stopping=3, progress=recorder))
    assert recorder.notes == []


# Mixing


def images(n=8, classes=3):
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(n) % classes
    return Batch((torch.randn(n, 2, 6, 4, generator=generator),), labels, torch.arange(n))


@pytest.mark.parametrize("settings", [{"mixup": 0.5}, {"cutmix": 1.0}, {"mixup": 0.5, "cutmix": 1.0}])
def test_mixed_labels_are_probabilities_of_the_step_alone(settings):
    mixer, batch = Mixer(TrainingConfig(**settings), 3, seed=0), images()
    torch.manual_seed(1)
    first = mixer.mix(batch, 2, 5)
    mixer.mix(batch, 2, 6)
    torch.manual_seed(2)
    second = mixer.mix(batch, 2, 5)
    assert torch.equal(first.inputs[0], second.inputs[0])
    assert torch.equal(first.labels, second.labels)
    assert first.labels.shape == (8, 3)
    assert first.labels.dtype == torch.float32
    assert torch.allclose(first.labels.sum(1), torch.ones(8))
    assert torch.equal(first.indices, batch.indices)
    others = [mixer.mix(batch, 2, 7), mixer.mix(batch, 3, 5), Mixer(TrainingConfig(**settings), 3, 1).mix(batch, 2, 5)]
    assert all(not torch.equal(first.inputs[0], other.inputs[0]) for other in others)


def test_of_two_ways_to_mix_each_has_its_steps():
    batch = images()
    mixer = Mixer(TrainingConfig(mixup=1.0, cutmix=1.0), 3, seed=0)
    found = [mixer.mix(batch, 0, step).inputs[0] for step in range(40)]
    # CutMix leaves each pixel one of those that were there; a blend is none of them.
    old = batch.inputs[0].flatten()
    cut = [bool(torch.isin(each.flatten(), old).all()) for each in found]
    assert 10 < sum(cut) < 30


def test_mixed_batches_reach_the_objective(make, train):
    watched = Watched(make())
    rows = train(watched.model, objective=watched, epochs=1, mixup=1.0, accumulate=2)
    labels = torch.cat([batch.labels for batch in watched.batches])
    assert labels.shape == (160, 4)
    assert torch.allclose(labels.sum(1), torch.ones(160))
    assert math.isfinite(rows[0]["loss"])


@pytest.mark.parametrize(("setting", "message"), [("mixup", "blends inputs of floats"), ("cutmix", "needs images")])
def test_what_cannot_be_mixed_is_told_with_the_setting(train, setting, message):
    tokens = torch.arange(24).reshape(12, 2) % 5
    labels = torch.arange(12) % 2
    data = DecisionData(
        ("a", "b"),
        (Input("tokens", (2,), "int64"),),
        Vectors(tokens, labels),
        Vectors(tokens, labels, "validation"),
    )
    model = nn.Sequential(nn.Embedding(5, 4), nn.Flatten(), nn.Linear(8, 2))
    with pytest.raises(StageError, match=rf"^{setting}: {setting} {message}"):
        train(model, data=data, batch_size=4, **{setting: 1.0})


# Augmented versions


def test_epochs_take_augmented_versions_in_turn(tmp_path):
    data = vectors()
    config = RecoveryConfig(epochs=5, batch_size=16, cache=TeacherCacheConfig(views=3))
    objective = Objective(linear(), config.losses, OneTeacher(linear(seed=1)))
    fit(objective, data, config, Workplace("cpu", 0, tmp_path, Recorder()))
    assert [asked["view"] for asked in data.train.asked] == [0, 1, 2, 0, 1]


def test_without_a_cache_versions_are_drawn_anew(train):
    data = vectors()
    train(linear(), data=data)
    assert [asked["view"] for asked in data.train.asked] == [None, None]
    assert len({asked["seed"] for asked in data.train.asked}) == 2
