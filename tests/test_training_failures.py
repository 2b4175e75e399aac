"""Training that fails says in which epoch, and proposes what the settings leave to be tried."""

import pytest
import torch
from torch import nn
from training_cases import LABELS, Recorder, Trainer, linear, vectors

from compress.config import KDLossConfig, LossEntry
from compress.errors import TrainingError
from compress.methods.epochs import Validated, best, diverged, stalled
from compress.models.factory import Arch, create

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def make(tiny):
    return lambda seed=0, **kwargs: create(Arch(tiny.factory, kwargs), seed=seed)


@pytest.fixture
def train(tmp_path, tiny_data):
    return Trainer(tmp_path, tiny_data.for_decisions())


# Not finite


@pytest.mark.parametrize(
    ("settings", "remedies"),
    [
        ({}, "a lower learning_rate than 1e+30, a gradient_clip such as 1.0, or a warm_up such as 0.05"),
        ({"warm_up": 0.3}, "a lower learning_rate than 1e+30 or a gradient_clip such as 1.0"),
        ({"gradient_clip": 1e9, "warm_up": 0.3}, "a lower learning_rate than 1e+30"),
        ({"schedule": "one_cycle", "gradient_clip": 1e9}, "a lower learning_rate than 1e+30"),
        (
            {"precision": "bf16", "warm_up": 0.3},
            "a lower learning_rate than 1e+30, a gradient_clip such as 1.0, or precision: fp32",
        ),
    ],
)
def test_a_loss_that_is_not_finite_names_the_epoch_and_what_is_left_to_try(make, train, settings, remedies):
    with pytest.raises(TrainingError) as raised:
        train(make(), learning_rate=1e30, **{"schedule": "constant", **settings})
    told, _, proposed = str(raised.value).partition(": try ")
    assert told.startswith("the loss is not finite in epoch 1 (by step ")
    assert proposed == remedies


def test_the_last_step_of_an_epoch_counts_too(make, train):
    """Its loss was taken before it: what it did shows on validation."""
    with pytest.raises(TrainingError, match="the validation loss is not finite in epoch 1: try a lower"):
        train(make(), batch_size=160, learning_rate=1e30, schedule="constant")


class Poisoned(nn.Linear):
    """Answers nothing but NaN from one training step on; counts them."""

    def __init__(self, poisoned_from):
        super().__init__(5, 3)
        self.poisoned_from, self.steps = poisoned_from, 0

    def forward(self, x):
        self.steps += self.training
        return super().forward(x) * (float("nan") if self.steps >= self.poisoned_from else 1.0)


@pytest.mark.parametrize("poisoned_from", [1, 62, 199])
def test_a_loss_that_is_not_finite_is_noticed_within_a_twentieth_of_the_epoch(train, poisoned_from):
    model = Poisoned(poisoned_from)
    with pytest.raises(TrainingError, match="not finite in epoch 1"):
        train(model, data=vectors(400), batch_size=2, epochs=3)
    assert model.steps - poisoned_from <= 200 / 20


def test_a_scale_that_vanished_is_an_error_of_its_own(train, monkeypatch):
    monkeypatch.setattr("compress.training.precision.Arithmetic.lost", lambda self: True)
    with pytest.raises(TrainingError, match="gradients in fp16 are not finite in epoch 1"):
        train(linear(), data=vectors())


# Memory


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError(),
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    ],
)
@pytest.mark.parametrize(
    ("settings", "remedies"),
    [
        (
            {},
            "accumulate: 2 (the same step in more, smaller parts), a smaller batch_size than 16, or precision: bf16",
        ),
        ({"accumulate": 8, "precision": "bf16"}, "a smaller batch_size than 16"),
        ({"batch_size": 1000, "accumulate": 50}, "a smaller batch_size than 160 or precision: bf16"),
    ],
)
def test_memory_that_runs_out_names_the_epoch_and_what_is_left_to_try(make, train, error, settings, remedies):
    model = make()

    def forward(x):
        raise error

    model.forward = forward
    with pytest.raises(TrainingError) as raised:
        train(model, **settings)
    assert str(raised.value) == f"out of memory in epoch 1: try {remedies}"


def test_other_errors_stay_what_they_are(make, train):
    model = make()

    def forward(x):
        raise RuntimeError("a bug of the model")

    model.forward = forward
    with pytest.raises(RuntimeError, match="a bug of the model"):
        train(model)


def test_layers_dropped_at_random_cannot_be_trained_together(make, train):
    model = make()

    def forward(x):
        raise RuntimeError("Expected to have finished reduction in the prior iteration before starting a new one.")

    model.forward = forward
    with pytest.raises(TrainingError, match=r"leaves parameters out in some steps .* train in one process"):
        train(model)


def test_a_model_that_cannot_be_compiled_says_so(train, monkeypatch):
    class BackendError(RuntimeError):
        __module__ = "torch._inductor.exc"

    def compile_(call, **_):
        def run(*args):
            raise BackendError("no working C++ compiler found\nand so on")

        return run

    monkeypatch.setattr("torch.compile", compile_)
    message = "compile: the model cannot be compiled here: no working C.. compiler found; set it to false"
    with pytest.raises(TrainingError, match=message):
        train(linear(), data=vectors(), compile=True)


# Going astray

GOOD, WRONG, WORSE = Validated(80.0, 1.0), Validated(25.0, 20.0), Validated(20.0, 400.0)


@pytest.mark.parametrize(
    ("epochs", "expected"),
    [
        ([GOOD, WRONG, WRONG, WORSE], True),
        ([WRONG, WORSE, WRONG], True),
        ([WRONG, WORSE], False),  # two are no proof
        ([WORSE, WORSE, WRONG], False),  # it gets better
        ([WRONG, GOOD, WORSE, WORSE], False),
        ([Validated(25.0, 13.8)] * 3, False),  # below ten times ln 4
        ([Validated(40.0, 500.0)] * 3, False),  # overconfident, but it knows something
        ([], False),
    ],
)
def test_training_goes_astray_only_when_it_knows_nothing_and_stays_so(epochs, expected):
    assert diverged(epochs, 4, most_frequent_percent=25.0) is expected


def test_the_best_epoch_is_the_first_of_equals():
    epochs = [Validated(50, 1.0), Validated(60, 0.9), Validated(60, 0.8), Validated(60, 0.8), Validated(55, 0.1)]
    assert best(epochs) == 2
    assert [stalled(epochs, patience) for patience in (1, 2, 3)] == [True, True, False]
    assert not stalled([], 1)


class Strays(nn.Linear):
    """Learns, and from a given call in evaluation mode on is ever surer of the wrong class."""

    def __init__(self, labels, strays_from):
        super().__init__(5, 3)
        self.labels, self.strays_from, self.validated = labels, strays_from, 0

    def forward(self, x):
        answer = super().forward(x)
        if self.training:
            return answer
        self.validated += 1
        if self.validated < self.strays_from:
            return answer
        return nn.functional.one_hot((self.labels + 1) % 3, 3) * 50.0 * self.validated


def test_training_that_goes_astray_ends_in_the_third_bad_epoch(train):
    data, recorder = vectors(), Recorder()
    with pytest.raises(TrainingError, match=r"training diverges in epoch 5: three times .*: try a lower learning_rate"):
        train(Strays(data.validation.labels, 3), data=data, epochs=9, progress=recorder)
    assert [result.epoch for result in recorder.epochs] == [1, 2, 3, 4]


def test_losses_that_grow_with_their_temperature_are_no_divergence(train):
    heat = KDLossConfig.model_validate({"temperature": {"start": 0.5, "end": 1000.0}, "weight": 1.0})
    rows = train(
        linear(),
        data=vectors(),
        teacher=linear(seed=1),
        losses=(LossEntry(kd=heat), *LABELS),
        epochs=5,
        learning_rate=0.01,
    )
    assert len(rows) == 5
