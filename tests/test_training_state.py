"""What an epoch leaves behind: a killed training ends at the bits of one that was not; any other one begins anew."""

import os
import signal
import subprocess
import sys

import pytest
import torch
from training_cases import (
    LABELS,
    KilledError,
    Recorder,
    Trainer,
    best_epoch,
    bits,
    kill_after,
    linear,
    mislabelled,
    same,
    timeless,
    vectors,
)

from compress import run
from compress.config import KDLossConfig, LossEntry
from compress.models.factory import Arch, create
from compress.training import Objective

pytestmark = pytest.mark.usefixtures("one_thread")

SETTINGS = {
    "sgd": {"gradient_clip": 1.0, "channels_last": False},
    "sgd bf16": {"gradient_clip": 1.0, "precision": "bf16"},
    "adamw with an average": {"optimizer": "adamw", "learning_rate": 0.005, "ema": 0.9, "early_stopping": 4},
    "adam in parts": {"optimizer": "adam", "learning_rate": 0.005, "accumulate": 3, "precision": "bf16"},
    "rmsprop, mixed": {
        "optimizer": "rmsprop",
        "learning_rate": 1e-3,
        "mixup": 0.4,
        "cutmix": 1.0,
        "batchnorm": "frozen",
    },
    "steps without momentum": {"momentum": 0.0, "schedule": "step", "warm_up": 0.2},
}


@pytest.fixture
def make(tiny):
    return lambda seed=0, **kwargs: create(Arch(tiny.factory, kwargs), seed=seed)


@pytest.fixture
def train(tmp_path, tiny_data):
    return Trainer(tmp_path, tiny_data.for_decisions())


# Going on


@pytest.mark.parametrize("name", SETTINGS)
def test_a_killed_training_ends_at_the_same_bits(make, train, tmp_path, name):
    settings = {"epochs": 4, **SETTINGS[name]}
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


def test_what_learns_beside_the_model_goes_on_too(make, train, tmp_path):
    """Other students, and the average that the model imitates."""
    losses = (
        *LABELS,
        LossEntry(kd=KDLossConfig.model_validate({"from": "peers"})),
        LossEntry(kd=KDLossConfig.model_validate({"from": "ema"})),
    )

    def objective():
        return Objective(make(0, dropout=0.2), losses, None, peers=[make(1, dropout=0.2)], ema_decay=0.9)

    straight, killed, resumed = objective(), objective(), objective()
    train(straight.model, objective=straight, epochs=3)
    with pytest.raises(KilledError):
        train(killed.model, objective=killed, epochs=3, scratch=tmp_path / "killed", progress=kill_after(2))
    train(resumed.model, objective=resumed, epochs=3, scratch=tmp_path / "killed")
    assert same(bits(straight), bits(resumed))


def test_a_resumed_training_still_knows_an_earlier_best_epoch(make, train, tmp_path, tiny_data):
    settings = {"epochs": 5, "schedule": "constant", "data": mislabelled(tiny_data.for_decisions())}
    straight, resumed = make(), make()
    assert best_epoch(train(straight, **settings)) <= 3
    with pytest.raises(KilledError):
        train(make(), scratch=tmp_path / "killed", progress=kill_after(4), **settings)
    train(resumed, scratch=tmp_path / "killed", **settings)
    assert same(bits(straight), bits(resumed))


@pytest.mark.parametrize("killed_after", [1, 3])
def test_patience_counts_from_before_it_was_killed(make, train, tmp_path, tiny_data, killed_after):
    settings = {
        "epochs": 9,
        "schedule": "constant",
        "early_stopping": 3,
        "ema": 0.5,
        "data": mislabelled(tiny_data.for_decisions()),
    }
    straight, resumed = make(), make()
    rows = train(straight, **settings)
    assert killed_after < len(rows) < 9
    with pytest.raises(KilledError):
        train(make(), scratch=tmp_path / "killed", progress=kill_after(killed_after), **settings)
    resumed_rows = train(resumed, scratch=tmp_path / "killed", **settings)
    assert timeless(resumed_rows) == timeless(rows)
    assert same(bits(straight), bits(resumed))


@pytest.fixture
def scaled(monkeypatch):
    """fp32 with the loss scaled as in fp16, and a factor that doubles every third step; CPUs have no fp16 to speak of."""
    real, made = torch.amp.GradScaler, []

    def scaler(device, enabled):
        made.append(real("cpu", init_scale=2.0**10, growth_interval=3))
        return made[-1]

    monkeypatch.setattr("torch.amp.GradScaler", scaler)
    return made


def test_the_scale_of_the_loss_goes_on_and_cancels_out(train, scaled, tmp_path):
    settings = {"epochs": 3, "data": vectors(), "gradient_clip": 0.5}
    straight, resumed = linear(), linear()
    train(straight, **settings)
    with pytest.raises(KilledError):
        train(linear(), scratch=tmp_path / "killed", progress=kill_after(2), **settings)
    train(resumed, scratch=tmp_path / "killed", **settings)
    assert same(bits(straight), bits(resumed))
    first, _, last = scaled
    assert last.state_dict() == first.state_dict()
    assert first.get_scale() == 2.0**13  # nine steps


def test_scaling_the_loss_changes_no_step(train, request):
    plain, scaled = linear(), linear()
    train(plain, data=vectors(), gradient_clip=0.5)
    request.getfixturevalue("scaled")
    train(scaled, data=vectors(), gradient_clip=0.5)
    assert torch.allclose(plain.weight, scaled.weight, rtol=1e-6, atol=0)


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


# Beginning anew


def test_a_second_training_in_the_same_place_begins_anew(make, train, tmp_path):
    train(make(), epochs=3, scratch=tmp_path / "place")
    second, alone, recorder = make(width=12), make(width=12), Recorder()
    train(second, epochs=3, scratch=tmp_path / "place", progress=recorder)
    train(alone, epochs=3)
    assert same(bits(second), bits(alone))
    assert recorder.notes == ["training begins anew: the weights to begin with changed since epoch 2"]


@pytest.mark.parametrize("damage", [lambda content: b"no tensors", lambda content: content[: len(content) // 2]])
def test_a_damaged_state_is_begun_anew(make, train, tmp_path, damage):
    undisturbed, model, recorder = make(), make(), Recorder()
    train(undisturbed)
    with pytest.raises(KilledError):
        train(make(), scratch=tmp_path / "place", progress=kill_after(1))
    state = tmp_path / "place" / "training.safetensors"
    state.write_bytes(damage(state.read_bytes()))
    train(model, scratch=tmp_path / "place", progress=recorder)
    assert same(bits(model), bits(undisturbed))
    assert recorder.notes == ["training begins anew: the state it left behind cannot be read"]


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"precision": "bf16"}, "precision changed from fp32 to bf16"),
        ({"channels_last": False}, "memory format changed from channels_last to contiguous_format"),
        ({"learning_rate": 0.01}, "the settings changed"),
    ],
)
def test_other_arithmetic_begins_anew_and_says_why(make, train, tmp_path, changed, reason):
    with pytest.raises(KilledError):
        train(make(), scratch=tmp_path / "place", progress=kill_after(1))
    alone, model, recorder = make(), make(), Recorder()
    train(alone, **changed)
    train(model, scratch=tmp_path / "place", progress=recorder, **changed)
    assert recorder.notes == [f"training begins anew: {reason} since epoch 1"]
    assert same(bits(model), bits(alone))


def test_another_number_of_threads_begins_anew(make, train, tmp_path):
    with pytest.raises(KilledError):
        train(make(), scratch=tmp_path / "place", progress=kill_after(1))
    recorder = Recorder()
    torch.set_num_threads(2)
    train(make(), scratch=tmp_path / "place", progress=recorder)
    assert recorder.notes == ["training begins anew: threads changed from 1 to 2 since epoch 1"]


def test_the_state_is_tensors_and_json(make, train, tmp_path):
    """No pickle: safetensors cannot hold any, and nothing else is written."""
    with pytest.raises(KilledError):
        train(make(), scratch=tmp_path / "place", progress=kill_after(1), ema=0.9)
    assert [path.name for path in (tmp_path / "place").iterdir()] == ["training.safetensors"]
