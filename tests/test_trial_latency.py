"""Times of single layers in ONNX Runtime: real measurements, of which only what any machine agrees on is expected."""

import statistics

import pytest
import torch
from torch import nn

from compress.bench import single_answer, trial_latency
from compress.bench.trial_latency import layer_times
from compress.errors import CompressError, ExportError

pytestmark = pytest.mark.usefixtures("one_thread")

QUICK = {"rounds": 6, "seconds": 0.005}


def medians(times):
    return {name: statistics.median(rounds) for name, rounds in times.items()}


def small_and_large():
    return {
        "large": (nn.Conv2d(64, 64, 3, padding=1), (1, 64, 24, 20)),
        "twin": (nn.Conv2d(64, 64, 3, padding=1), (1, 64, 24, 20)),
        "split": (nn.Sequential(nn.Conv2d(64, 4, 3, padding=1), nn.Conv2d(4, 64, 1)), (1, 64, 24, 20)),
    }


@pytest.mark.parametrize("int8", [False, True])
def test_a_huge_saving_is_faster_and_equal_layers_are_about_equal(int8):
    times = layer_times(small_and_large(), int8=int8, **QUICK)
    assert list(times) == ["large", "twin", "split"]
    assert {len(rounds) for rounds in times.values()} == {QUICK["rounds"]}
    times = medians(times)
    assert times["split"] < times["large"]
    assert 0.5 < times["large"] / times["twin"] < 2


def test_any_layer_of_a_network_can_be_timed_and_a_batch_costs():
    rounds = layer_times(
        {
            "linear": (nn.Linear(64, 64), (1, 64)),
            "tokens": (nn.Linear(64, 64), (1, 50, 64)),
            "windows": (nn.Linear(64, 64), (200, 50, 64)),
            "tucker": (
                nn.Sequential(nn.Conv2d(8, 3, 1), nn.Conv2d(3, 3, 3, padding="same"), nn.Conv2d(3, 8, 1)),
                (1, 8, 9, 5),
            ),
        },
        **QUICK,
    )
    times = medians(rounds)
    assert all(time >= 0 for found in rounds.values() for time in found)
    assert times["windows"] > 5 * times["tokens"]


def test_nothing_takes_no_time():
    assert layer_times({}) == {}


def test_what_cannot_be_exported_is_said():
    class Stubborn(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(ExportError, match="torch cannot export"):
        layer_times({"stubborn": (Stubborn(), (1, 3))}, **QUICK)


def test_a_process_that_fails_is_told_with_its_reason(tmp_path, monkeypatch):
    fake = tmp_path / "start.py"
    fake.write_text("import sys; sys.stdin.read(); sys.exit('no more memory')\n")
    monkeypatch.setattr(single_answer, "START", fake)
    with pytest.raises(CompressError, match="times of layers: its process ended with code 1: no more memory"):
        layer_times({"one": (nn.Linear(2, 2), (1, 2))}, **QUICK)


def test_a_worker_that_refuses_says_which_file_without_its_folder(monkeypatch):
    monkeypatch.setattr(trial_latency, "serialized", lambda proto: b"no model")
    with pytest.raises(CompressError, match=r"times of layers: .*0\.onnx") as raised:
        layer_times({"one": (nn.Linear(2, 2), (1, 2))}, **QUICK)
    assert "compress-" not in str(raised.value)


def test_the_modules_stay_as_they_are():
    layer = nn.Conv2d(3, 4, 3).train()
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    layer_times({"one": (layer, (1, 3, 5, 7))}, **QUICK)
    assert layer.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())
