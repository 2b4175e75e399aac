"""The training loop: deterministic, resumable to the bit, honest about which epoch is best."""

import dataclasses
import itertools
import os
import random
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

from compress import run
from compress.config import KDLossConfig, LabelLossConfig, LossEntry, TrainConfig, TrainingConfig
from compress.data.load import load_data
from compress.errors import TrainingError
from compress.events import Silent
from compress.models.factory import Arch, create
from compress.training import Workplace, evaluate, fit

pytestmark = pytest.mark.usefixtures("one_thread")

LABELS = (LossEntry(labels=LabelLossConfig(weight=1.0)),)
SOFT = (LossEntry(kd=KDLossConfig()), LossEntry(labels=LabelLossConfig()))


class Recorder(Silent):
    """Keeps epochs and notes; calls `then` after each epoch."""

    def __init__(self, then=lambda result: None):
        self.epochs, self.notes, self.then = [], [], then

    def epoch(self, result):
        self.epochs.append(result)
        self.then(result)

    def note(self, text):
        self.notes.append(text)


class KilledError(Exception):
    """Stands for whatever ends a process between two epochs."""


def kill_after(epoch):
    def then(result):
        if result.epoch == epoch:
            raise KilledError

    return Recorder(then)


@pytest.fixture
def make(tiny):
    return lambda seed=0, **kwargs: create(Arch(tiny.factory, kwargs), seed=seed)


@pytest.fixture
def train(tmp_path, tiny_data):
    """Trains a model in place; returns the rows."""
    folders = itertools.count()

    def go(model, *, scratch=None, seed=0, losses=LABELS, teacher=None, data=None, progress=None, **settings):
        settings = {"epochs": 2, "batch_size": 16, "learning_rate": 0.05, "precision": "fp32", **settings}
        place = Workplace("cpu", seed, scratch or tmp_path / f"scratch{next(folders)}", progress or Silent())
        data = data or tiny_data.for_decisions()
        return fit(model, data, losses, teacher, TrainingConfig(**settings), place)

    return go


def bits(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(first, second):
    return all(torch.equal(first[name], second[name]) for name in first.keys() | second.keys())


def timeless(rows):
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


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


def test_training_leaves_the_global_generators_alone(make, train):
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


# Resuming


def test_a_second_training_in_the_same_place_begins_anew(make, train, tmp_path):
    train(make(), epochs=3, scratch=tmp_path / "place")
    second, alone = make(width=12), make(width=12)
    train(second, epochs=3, scratch=tmp_path / "place")
    train(alone, epochs=3)
    assert same(bits(second), bits(alone))


def test_a_damaged_state_is_begun_anew(make, train, tmp_path):
    undisturbed, model = make(), make()
    train(undisturbed)
    (tmp_path / "place").mkdir()
    (tmp_path / "place" / "training.safetensors").write_bytes(b"no tensors")
    train(model, scratch=tmp_path / "place")
    assert same(bits(model), bits(undisturbed))


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_killed_training_ends_at_the_same_bits(make, train, tmp_path, optimizer, precision, channels_last):
    settings = {
        "epochs": 4,
        "optimizer": optimizer,
        "learning_rate": 0.05 if optimizer == "sgd" else 0.005,
        "precision": precision,
        "channels_last": channels_last,
        "gradient_clip": 1.0,
    }
    straight = make(dropout=0.2)
    rows = train(straight, **settings)
    for epoch in (1, 3):  # killed twice
        with pytest.raises(KilledError):
            train(make(dropout=0.2), scratch=tmp_path / "killed", progress=kill_after(epoch), **settings)
    resumed, recorder = make(dropout=0.2), Recorder()
    resumed_rows = train(resumed, scratch=tmp_path / "killed", progress=recorder, **settings)
    assert recorder.notes == ["goes on after epoch 3 of 4"]
    assert [result.epoch for result in recorder.epochs] == [4]
    assert same(bits(straight), bits(resumed))
    assert timeless(rows) == timeless(resumed_rows)


def test_a_resumed_training_still_knows_an_earlier_best_epoch(make, train, tmp_path, misleading):
    settings = {"epochs": 5, "schedule": "constant", "data": misleading}
    straight, resumed = make(), make()
    assert best_epoch(train(straight, **settings)) <= 3
    with pytest.raises(KilledError):
        train(make(), scratch=tmp_path / "killed", progress=kill_after(4), **settings)
    train(resumed, scratch=tmp_path / "killed", **settings)
    assert same(bits(straight), bits(resumed))


def test_kill_9_in_the_middle_of_an_epoch(tiny, tmp_path):
    train = {"train": {"epochs": 4, "batch_size": 16, "precision": "fp32"}}
    model = {"factory": tiny.named("mortal"), "kwargs": {"dropout": 0.2}}
    pipeline = tiny.pipeline(tmp_path, train, model=model)
    straight = run(pipeline, runs=tmp_path / "straight")
    command = [sys.executable, "-m", "compress", "run", str(tmp_path / "pipeline.yaml"), "--runs"]
    environment = {**os.environ, "DIE_AT": "25"}  # ten steps an epoch: in the third
    killed = subprocess.run([*command, str(tmp_path / "killed")], env=environment, capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert not list((tmp_path / "killed" / "tiny").glob("*-train-*"))
    recorder = Recorder()
    resumed = run(pipeline, runs=tmp_path / "killed", progress=recorder)
    assert "goes on after epoch 2 of 4" in recorder.notes
    assert [row.digest for row in resumed.rows] == [row.digest for row in straight.rows]
    assert not (tmp_path / "killed" / "tiny" / ".work").exists()


# The best epoch


@pytest.fixture
def misleading(tiny_data):
    """Validation labels that get worse the more a model learns."""
    data = tiny_data.for_decisions()
    validation = data.train.take(range(len(data.train)))
    wrong = (validation.labels + 1) % len(data.classes)
    batches = validation.batches

    class Wrong:
        name, labels = "validation", wrong

        def __len__(self):
            return len(wrong)

        def batches(self, batch_size):
            start = 0
            for batch in batches(batch_size):
                yield batch._replace(labels=wrong[start : start + len(batch.labels)])
                start += len(batch.labels)

    return dataclasses.replace(data, validation=Wrong())


def best_epoch(rows):
    return max(rows, key=lambda row: (row["validation_percent"], -row["validation_loss"]))["epoch"]


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


# Divergence


@pytest.mark.parametrize("batch_size", [16, 160])
def test_divergence_names_the_epoch_and_the_remedy(make, train, batch_size):
    message = r"not finite in epoch 1: try a lower learning_rate than 1e\+30, a gradient_clip such as 1.0, or"
    with pytest.raises(TrainingError, match=message):
        train(make(), batch_size=batch_size, learning_rate=1e30, schedule="constant")


def test_memory_that_runs_out_names_the_batch_size(make, train):
    model = make()

    def forward(x):
        raise torch.OutOfMemoryError

    model.forward = forward
    with pytest.raises(TrainingError, match="out of memory in epoch 1: try a smaller batch_size than 16"):
        train(model)


def test_a_model_without_anything_to_train_is_refused(make, train):
    with pytest.raises(TrainingError, match=r"no parameter .* can be trained"):
        train(make().requires_grad_(False))


def test_frozen_parameters_stay(make, train):
    model = make()
    model.conv1.requires_grad_(False)
    before = bits(model)
    train(model)
    after = bits(model)
    assert torch.equal(before["conv1.weight"], after["conv1.weight"])
    assert not torch.equal(before["conv2.weight"], after["conv2.weight"])


# Objective and optimizer


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_weight_decay_spares_norms_and_biases(make, train, optimizer):
    after = []
    for weight_decay in (0.0, 0.5):
        model = make()
        # One step: the gradients are the same in both trainings.
        train(model, epochs=1, batch_size=160, optimizer=optimizer, weight_decay=weight_decay, schedule="constant")
        after.append(dict(model.named_parameters()))
    for name, parameter in after[0].items():
        assert torch.equal(parameter, after[1][name]) == (parameter.dim() == 1), name


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
    rows = fit(make(), tiny_data.for_decisions(), config.losses, None, config, Workplace("cpu", 0, tmp_path, Silent()))
    assert len(rows) == 1
