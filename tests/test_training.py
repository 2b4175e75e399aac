"""The training loop: deterministic, resumable to the bit, honest about which epoch is best."""

import inspect
import random

import numpy as np
import pytest
import torch
from training_cases import Recorder, Trainer, best_epoch, bits, mislabelled, same, timeless

from compress.config import KDLossConfig, LabelLossConfig, LossEntry, TrainConfig
from compress.data.load import load_data
from compress.events import Silent
from compress.methods.schedules import learning_rate
from compress.models.factory import Arch, create
from compress.training import Objective, Workplace, evaluate, fit

pytestmark = pytest.mark.usefixtures("one_thread")

SOFT = (LossEntry(kd=KDLossConfig()), LossEntry(labels=LabelLossConfig()))


@pytest.fixture
def make(tiny):
    return lambda seed=0, **kwargs: create(Arch(tiny.factory, kwargs), seed=seed)


@pytest.fixture
def train(tmp_path, tiny_data):
    return Trainer(tmp_path, tiny_data.for_decisions())


# The same seed, the same bits


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_seed_decides_every_bit(make, train, precision):
    found = []
    for seed in (0, 0, 1):
        model = make(dropout=0.3)
        rows = train(model, seed=seed, precision=precision)
        found.append((bits(model), timeless(rows)))
    assert same(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]
    assert not same(found[0][0], found[2][0])


def test_training_leaves_the_global_generators_alone(make, train, monkeypatch):
    # In tests it is wrapped by beartype, which draws which of several values it checks.
    monkeypatch.setattr("compress.training.loop.learning_rate", inspect.unwrap(learning_rate))
    torch.manual_seed(5)
    model = make()
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    train(model)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (random.getstate(), np.random.get_state()[1].tolist())  # noqa: NPY002


def test_what_was_drawn_before_does_not_matter(make, train):
    first, second = make(dropout=0.3), make(dropout=0.3)
    torch.manual_seed(1)
    train(first)
    torch.manual_seed(2)
    train(second)
    assert same(bits(first), bits(second))


# The best epoch


@pytest.fixture
def misleading(tiny_data):
    return mislabelled(tiny_data.for_decisions())


def test_the_best_epoch_on_validation_is_kept(make, train, misleading):
    model, kept = make(), {}
    recorder = Recorder(lambda result: kept.update({result.epoch: bits(model)}))
    rows = train(model, epochs=4, schedule="constant", data=misleading, progress=recorder)
    best = best_epoch(rows)
    assert best < 4
    assert same(bits(model), kept[best])
    assert not same(kept[best], kept[4])
    loss, correct = evaluate(model, misleading.validation, "cpu")
    assert loss == pytest.approx(rows[best - 1]["validation_loss"])
    assert 100 * correct / len(misleading.validation) == rows[best - 1]["validation_percent"]
    assert not model.training


# Rows


def test_rows_tell_the_learning_rate_and_the_time(make, train):
    recorder = Recorder()
    rows = train(make(), epochs=3, schedule="cosine", learning_rate=0.1, progress=recorder)
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    rates = [row["learning_rate"] for row in rows]
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] == pytest.approx(0.1 * 1e-4)
    assert all(row["seconds"] > 0 and 0 <= row["validation_percent"] <= 100 for row in rows)
    assert all(result.samples_per_second > 0 and result.epochs == 3 for result in recorder.epochs)


@pytest.mark.parametrize(("batch_size", "steps"), [(1000, 1), (160, 1), (100, 1), (64, 2)])
def test_batches_larger_than_the_split_and_incomplete_ones(make, train, batch_size, steps):
    class Steps(Silent):
        seen = 0

        def work(self, what, done, total, detail=""):
            assert total == steps
            self.seen += 1

    progress = Steps()
    train(make(), epochs=1, batch_size=batch_size, progress=progress)
    assert progress.seen == steps


# What is trained


def test_frozen_parameters_stay(make, train):
    model = make()
    model.conv1.requires_grad_(False)
    before = bits(model)
    train(model)
    after = bits(model)
    assert torch.equal(before["conv1.weight"], after["conv1.weight"])
    assert not torch.equal(before["conv2.weight"], after["conv2.weight"])


def test_the_teacher_teaches_and_stays_as_it_is(make, train):
    teacher = make(1)
    train(teacher, epochs=3)
    teacher.train()  # even one that comes in training mode must not update its statistics
    before = bits(teacher)
    with_teacher, without = make(), make()
    train(with_teacher, losses=SOFT, teacher=teacher)
    train(without)
    assert same(before, bits(teacher))
    assert not same(bits(with_teacher), bits(without))


def test_a_student_follows_its_teacher_without_labels(make, train, tiny_data):
    teacher, student = make(1), make(0)
    settings = {"epochs": 3, "optimizer": "adamw", "learning_rate": 0.01}
    train(teacher, **settings)
    train(student, losses=(LossEntry(kd=KDLossConfig(weight=1.0)),), teacher=teacher, **settings)
    _, of_teacher = evaluate(teacher, tiny_data.validation, "cpu")
    _, of_student = evaluate(student, tiny_data.validation, "cpu")
    assert of_teacher > 70
    assert of_student > 50  # chance: 24


def test_vectors_train_as_well_as_images(tmp_path, train):
    import json

    from compress.config import ArraysConfig

    rng = np.random.default_rng(0)
    for split, n in (("train", 64), ("validation", 32), ("test", 32)):
        labels = np.arange(n) % 2
        np.save(tmp_path / f"{split}_labels.npy", labels)
        np.save(tmp_path / f"{split}_images.npy", (rng.normal(0, 0.3, (n, 5)) + labels[:, None]).astype(np.float32))
    config = {"kind": "arrays", "root": str(tmp_path), "layout": "any", "validation": {"from": "given"}}
    data = load_data(ArraysConfig.model_validate_json(json.dumps(config)), 0)
    torch.manual_seed(0)
    model = torch.nn.Linear(5, 2)
    rows = train(model, data=data.for_decisions(), epochs=3, learning_rate=0.5)
    assert rows[-1]["validation_percent"] > 90


def test_defaults_are_those_of_the_settings(tiny_data, make, tmp_path):
    """`- train:` alone works; one epoch here, for time."""
    config = TrainConfig(epochs=1)
    rows = fit(
        Objective(make(), config.losses, None),
        tiny_data.for_decisions(),
        config,
        Workplace("cpu", 0, tmp_path, Silent()),
    )
    assert len(rows) == 1
