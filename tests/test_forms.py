"""The forms of a layer: which there are, what they cost and lose, and the weights that they become."""

import pytest
import torch
from torch import nn

from compress import surgery
from compress.edits import Factor
from compress.factorization.calls import calls_of
from compress.factorization.forms import MOST, Limits, forms_of, merged, split_weights
from compress.factorization.responses import listen
from compress.methods import lowrank
from compress.methods.seen import lost
from compress.methods.spatial import split_spatial
from compress.methods.tucker import split_tucker
from compress.models.cost import macs

pytestmark = pytest.mark.usefixtures("one_thread")

ALL = ("channel", "spatial", "tucker")
LIMITS = Limits(multiple=2, min_saving=0.2)


class Batch:
    def __init__(self, *inputs):
        self.inputs = inputs


def layer_and_inputs(stride=1, samples=6):
    """A convolution in a network of its own, and inputs whose channels differ much."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 12, 3, stride=stride, padding=1)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    scales = torch.tensor([5.0, 3.0, 1.0, 0.5, 0.2, 0.1, 0.1, 0.05])[:, None, None]
    return model, scales * torch.randn(samples, 8, 7, 10, generator=generator) + 1


def heard_of(model, inputs):
    return listen(model, ["0"], [Batch(inputs)], patches_of=["0"], samples=len(inputs))["0"]


def forms(model, inputs, heard=None, splits=ALL, limits=LIMITS):
    return forms_of(model[0].weight.detach(), calls_of(model, ["0"], (inputs,))["0"], splits, limits, heard)


def in_form(model, form, heard):
    """The model with its layer split."""
    weight, bias = model[0].weight.detach(), model[0].bias.detach()
    found = split_weights(weight, bias, form, heard)
    edit = Factor(module="0", rank=form.rank, split=form.split, rank_in=form.rank_in)
    surgery.apply(model, edit)
    with torch.no_grad():
        for part, values in zip(model[0], found.parts, strict=True):
            part.weight.copy_(values.reshape(part.weight.shape))
        model[0][-1].bias.copy_(bias if found.shift is None else bias + found.shift)
    return model


@pytest.mark.parametrize("stride", [1, 2])
def test_costs_are_those_of_the_layers_and_ranks_are_multiples(stride):
    model, inputs = layer_and_inputs(stride)
    whole = macs(model, (inputs[:1],))
    found = forms(model, inputs)
    assert {form.split for form in found} == set(ALL)
    for form in found:
        split, _ = layer_and_inputs(stride)
        surgery.apply(split, Factor(module="0", rank=form.rank, split=form.split, rank_in=form.rank_in))
        assert macs(split, (inputs[:1],)) == form.macs <= 0.8 * whole
        assert form.rank % 2 == 0
        assert (form.rank_in or 0) % 2 == 0


def test_only_forms_that_differ_are_offered():
    generator = torch.Generator().manual_seed(0)
    for shape, expected in {
        (8, 16): {"channel"},
        (8, 16, 1, 1): {"channel"},
        (8, 16, 3, 1): {"channel", "tucker"},
        (8, 16, 1, 3): set(ALL),
    }.items():
        weight = torch.randn(shape, generator=generator)
        given = (1, 16) if len(shape) == 2 else (1, 16, 6, 9)
        layer = nn.Linear(16, 8) if len(shape) == 2 else nn.Conv2d(16, 8, shape[2:])
        call = calls_of(nn.Sequential(layer), ["0"], (torch.zeros(given),))["0"]
        assert {form.split for form in forms_of(weight, call, ALL, Limits(1, 0.1))} == expected
        assert {form.split for form in forms_of(weight, call, ["channel"], Limits(1, 0.1))} == {"channel"}


def test_a_large_layer_is_tried_at_few_ranks_from_the_cheapest_to_the_dearest():
    weight = torch.randn(64, 64, 3, 3, generator=torch.Generator().manual_seed(0))
    call = calls_of(nn.Sequential(nn.Conv2d(64, 64, 3)), ["0"], (torch.zeros(1, 64, 9, 9),))["0"]
    for split in ("spatial", "tucker"):
        found = forms_of(weight, call, [split], LIMITS)
        assert len(found) == MOST
        ordered = sorted(found, key=lambda form: form.macs)
        assert [form.error for form in ordered] == sorted((form.error for form in found), reverse=True)
        assert ordered[0].macs < 0.1 * 64 * 64 * 9 * call.out < 0.7 * 64 * 64 * 9 * call.out < ordered[-1].macs


def test_without_samples_errors_are_those_of_the_weight():
    model, inputs = layer_and_inputs()
    weight = model[0].weight.detach()
    for form in forms(model, inputs):
        parts = split_weights(weight, None, form).parts
        product = (parts[1] @ parts[0].flatten(1)).reshape(weight.shape) if form.split == "channel" else merged(parts)
        error = float((weight - product).square().sum() / weight.square().sum())
        if form.split == "tucker":  # alternating betters what was promised
            assert error <= form.error + 1e-5
        else:
            assert error == pytest.approx(form.error, abs=1e-5)


def test_with_samples_errors_are_those_of_the_outputs():
    model, inputs = layer_and_inputs()
    heard = heard_of(model, inputs)
    assert len(heard.patches) == 6 * 7 * 10  # all there are
    with torch.no_grad():
        whole = model(inputs)
    spread = (whole - whole.mean((0, 2, 3), keepdim=True)).square().sum()
    for form in forms(model, inputs, heard)[::3]:
        split = in_form(layer_and_inputs()[0], form, heard)
        with torch.no_grad():
            change = split(inputs) - whole
        torch.testing.assert_close(change.mean((0, 2, 3)), torch.zeros(12), rtol=0, atol=1e-3)
        error = float(change.square().sum() / spread)
        assert error <= form.error + 1e-4
        if form.split != "tucker":
            assert error == pytest.approx(form.error, abs=1e-4)


def test_no_form_loses_more_of_the_outputs_than_its_plain_split():
    model, inputs = layer_and_inputs()
    heard, weight = heard_of(model, inputs), model[0].weight.detach()
    better = 0
    for form in forms(model, inputs, heard, splits=("spatial", "tucker")):
        found = lost(weight, merged(split_weights(weight, None, form, heard).parts), heard.patches)
        plain = (
            split_spatial(weight, form.rank) if form.rank_in is None else split_tucker(weight, form.rank, form.rank_in)
        )
        assert found <= lost(weight, merged(plain), heard.patches) + 1e-9
        better += found < 0.9 * lost(weight, merged(plain), heard.patches)
    assert better > 5
    channel = forms(model, inputs, heard, splits=["channel"])
    for form in channel:
        first, second = split_weights(weight, None, form, heard).parts
        plain = [part.flatten(1) for part in lowrank.split(weight, form.rank)]
        aware = lost(weight, (second @ first.flatten(1)).reshape(weight.shape), heard.patches)
        assert aware <= lost(weight, (plain[1] @ plain[0]).reshape(weight.shape), heard.patches) + 1e-6


def test_forms_that_lose_all_are_not_offered():
    model, inputs = layer_and_inputs()
    with torch.no_grad():
        model[0].weight[:] = 0
    assert all(form.error == 0 for form in forms(model, inputs))
    still = torch.zeros_like(inputs)
    assert all(form.error < 1 for form in forms(layer_and_inputs()[0], still, heard_of(layer_and_inputs()[0], still)))
