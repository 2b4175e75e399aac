"""Ranks and factors of whole models: activation-aware truncation, biases that take the mean, budgets."""

import pytest
import torch
from torch import nn

from compress.edits import Factor
from compress.factorization.calls import Call, calls_of
from compress.factorization.forms import Limits, forms_of, full_rank
from compress.factorization.ranks import (
    Layer,
    OutOfReachError,
    at_energy,
    at_ratio,
    least_error,
    macs,
    same_energy,
)
from compress.factorization.responses import PATCHES, listen
from compress.methods.whitening import (
    Moments,
    add_moments,
    bias_correction,
    convolution_rows,
    shift_by_outputs,
    split_by_outputs,
)
from compress.models.cost import macs as macs_of

pytestmark = pytest.mark.usefixtures("one_thread")

LIMITS = Limits(multiple=1, min_saving=0.05)


def test_what_layers_give_out_is_what_they_compute(workshop, trained, tiny_data):
    model = workshop.build(trained).train()
    batches = list(tiny_data.train.take(range(40)).batches(16))
    found = listen(model, ["conv2", "hidden"], batches)
    assert model.training
    model.eval()
    inputs = torch.cat([batch.inputs[0] for batch in batches])
    with torch.no_grad():
        conv = model.conv2(model.bn1(model.conv1(inputs)).relu())
        hidden = model.hidden(model.conv3(model.bn2(conv).relu()).relu().mean((2, 3)))
    rows = conv.movedim(1, -1).flatten(0, 2).double()
    torch.testing.assert_close(found["conv2"].outputs.mean, rows.mean(0), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found["conv2"].outputs.covariance, torch.cov(rows.T, correction=0), rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(found["hidden"].outputs.mean, hidden.double().mean(0), rtol=1e-4, atol=1e-6)
    assert not any(module._forward_hooks for module in model.modules())


def test_patches_are_rows_of_what_a_convolution_multiplies(workshop, trained, tiny_data):
    model = workshop.build(trained)
    batches = list(tiny_data.train.take(range(40)).batches(16))
    settings = {"patches_of": {"conv2"}, "samples": 40}
    found = listen(model, ["conv1", "conv2"], batches, **settings)
    assert found["conv1"].patches is None
    patches = found["conv2"].patches
    assert patches.shape == (40 * min(6 * 4, -(-PATCHES // 40)), 16 * 9)
    rows = set()
    for batch in batches:
        with torch.no_grad():
            seen = model.bn1(model.conv1(batch.inputs[0])).relu()
        rows |= {row.numpy().tobytes() for row in convolution_rows(seen, (3, 3), (2, 2), (1, 1))}
    assert {row.numpy().tobytes() for row in patches} <= rows
    assert torch.equal(patches, listen(model, ["conv2"], batches, **settings)["conv2"].patches)


def test_where_layers_are_applied():
    model = nn.Sequential(
        nn.Conv2d(2, 3, (3, 1), stride=(2, 1), padding=1), nn.Conv2d(3, 3, 1), nn.Flatten(2), nn.Linear(33, 5)
    )
    found = calls_of(model, ["0", "1", "3"], (torch.zeros(4, 2, 6, 9),))
    assert found["0"] == Call((1, 2, 6, 9), into=54, middle=3 * 9, out=3 * 11)
    assert found["1"] == Call((1, 3, 3, 11), into=33, middle=33, out=33)
    assert found["3"] == Call((1, 3, 33), into=3, middle=3, out=3)
    again = nn.Sequential(shared := nn.Conv2d(2, 2, 3, padding=1), nn.MaxPool2d(2), shared)
    assert calls_of(again, ["0"], (torch.zeros(1, 2, 6, 4),))["0"] == Call((1, 2, 6, 4), 30, 30, 30)


def test_the_shift_from_outputs_is_that_from_inputs():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 9, generator=generator, dtype=torch.float64)
    inputs = torch.randn(50, 9, generator=generator, dtype=torch.float64) + 3
    seen: Moments = add_moments(None, inputs @ weight.T)
    first, second = split_by_outputs(weight, seen.covariance, 2)
    expected = bias_correction(weight, second @ first, inputs.mean(0))
    torch.testing.assert_close(shift_by_outputs(second, seen.mean), expected, rtol=1e-9, atol=1e-9)


def errors(workshop, whole, result, data):
    """Mean squared change of the logits on the calibration samples."""
    inputs = data.train.take(range(len(data.train)))
    batch = next(iter(inputs.batches(len(data.train))))
    with torch.no_grad():
        before, after = (workshop.build(one)(*batch.inputs) for one in (whole, result))
    return (before - after).square().mean().item()


def test_outputs_are_kept_better_than_by_plain_svd(workshop, trained, tiny_data):
    settings = {"target": {"ratio": 0.25}, "multiple": 1, "recovery": None, "batchnorm_samples": 0}
    plain = workshop.run(trained, "factorize", truncation="weights", **settings)
    aware = workshop.run(trained, "factorize", truncation="outputs", samples=len(tiny_data.train), **settings)
    assert [(edit.module, edit.rank) for edit in plain.edits] == [(edit.module, edit.rank) for edit in aware.edits]
    assert errors(workshop, trained, aware, tiny_data) < errors(workshop, trained, plain, tiny_data)


def test_a_layer_without_bias_gets_one_that_keeps_its_mean(workshop, trained, tiny_data):
    settings = {"target": {"ratio": 0.25}, "protect": ["conv[23]", "h*"], "multiple": 1, "min_saving": 0.01}
    result = workshop.run(trained, "factorize", samples=160, recovery=None, batchnorm_samples=0, **settings)
    assert result.edits[-1] == Factor(module="conv1", rank=3, bias=True)
    inputs = next(iter(tiny_data.train.take(range(160)).batches(160))).inputs[0]
    whole, split = workshop.build(trained), workshop.build(result)
    assert whole.conv1.bias is None
    assert split.conv1[1].bias is not None
    with torch.no_grad():
        means = [model.conv1(inputs).mean((0, 2, 3)) for model in (whole, split)]
    torch.testing.assert_close(means[1], means[0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("truncation", ["outputs", "weights"])
@pytest.mark.parametrize("allocation", ["least_error", "same_energy"])
def test_the_budget_is_met(truncation, allocation, workshop, trained):
    settings = {"truncation": truncation, "allocation": allocation, "multiple": 1, "min_saving": 0.05}
    result = workshop.run(trained, "factorize", target={"macs": 0.7}, recovery=None, **settings)
    whole, left = (macs_of(workshop.build(one), workshop.dataset.example()) for one in (trained, result))
    assert 0.7 * 0.9 < left / whole <= 0.7


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"truncation": "weights", "samples": 9}, "samples: truncation 'weights' looks at no samples"),
        ({"target": {"energy": 0.9}, "allocation": "same_energy"}, "allocation: a target of energy decides"),
        (
            {"target": {"ratio": 0.5}, "splits": ["channel", "tucker"]},
            "splits: a target of ratio is a fraction of the ch",
        ),
        ({"splits": ["tucker", "tucker"]}, "splits: each form is named once"),
        ({"splits": []}, "splits"),
        ({"splits": ["svd"]}, "splits"),
        ({"faster_by": 0.0, "timed_as": "int8"}, "timed_as: with faster_by 0 nothing is timed"),
        ({"faster_by": 1.0}, "faster_by"),
    ],
)
def test_settings_that_nobody_reads_are_refused(settings, told, workshop, trained):
    with pytest.raises(ValueError, match=told):
        workshop.draft(trained, "factorize", **settings)


# Ranks


def layers(*sizes, limits=LIMITS):
    generator = torch.Generator().manual_seed(1)
    found = []
    for number, (out, rest) in enumerate(sizes):
        weight = torch.randn(out, rest, generator=generator)
        forms = forms_of(weight, Call((1, rest), 1, 1, 1), ["channel", "spatial", "tucker"], limits)
        found.append(Layer(f"layer{number}", out * rest, full_rank(weight), forms))
    return found


def total_error(chosen):
    return sum(form.error for form in chosen.values())


@pytest.mark.parametrize("share", [0.4, 0.6, 0.8])
def test_the_least_error_is_no_more_than_that_of_equal_energies(share):
    some = layers((12, 40), (30, 30), (8, 90))
    budget = int(share * macs(some, {}))
    greedy, equal = (way(some, budget) for way in (least_error, same_energy))
    assert macs(some, greedy) <= budget
    assert macs(some, equal) <= budget
    assert total_error(greedy) <= total_error(equal) + 1e-9


@pytest.mark.parametrize("way", [least_error, same_energy])
def test_a_budget_out_of_reach_says_what_is_in_reach(way):
    some = layers((12, 40), (30, 30))
    with pytest.raises(OutOfReachError) as raised:
        way(some, 10)
    least = raised.value.least
    assert least == macs(some, at_energy(some, 0.0))
    assert macs(some, way(some, least)) == least


def test_ranks_are_multiples_and_only_where_they_pay():
    some = layers((16, 64), (4, 4), limits=Limits(4, 0.3))
    forms = least_error(some, int(0.7 * macs(some, {})))
    assert set(forms) == {"layer0"}
    assert forms["layer0"].rank % 4 == 0


def test_an_energy_takes_the_cheapest_form_that_keeps_it_and_a_ratio_the_rank():
    (layer,) = layers((12, 40))
    for energy in (0.2, 0.6, 0.8):
        form = at_energy([layer], energy)["layer0"]
        assert form.error <= 1 - energy
        assert all(other.macs >= form.macs for other in layer.forms if other.error <= 1 - energy)
    assert at_energy([layer], 0.999) == {}
    assert at_ratio([layer], 0.4, 2)["layer0"].rank == 6  # of 12, 4.8 rounded up


def test_a_layer_that_is_never_called_is_split_by_its_weights(tiny_data):
    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle = nn.Linear(96, 4), nn.Linear(96, 4)

        def forward(self, x):
            return self.used(x.flatten(1))

    found = listen(Idle(), ["used", "idle"], tiny_data.train.take(range(8)).batches(8))
    assert list(found) == ["used"]
