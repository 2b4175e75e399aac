"""Edits as data: replayed exactly, anywhere; refused by name where they do not fit."""

import copy
import re

import pytest
import torch
from networks import Residual, Tied, edits_for, network, randomise
from pydantic import ValidationError
from torch import nn

from compress import surgery
from compress.edits import EDITS, Attribute, Factor, Keep
from compress.errors import CheckpointError
from compress.methods.spatial import split_spatial
from compress.methods.tucker import split_tucker

pytestmark = pytest.mark.usefixtures("one_thread")


class Oddities(nn.Module):
    """What users put into modules: masks, counters, plain tensors, numbers that are no shapes, a nested tuple."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.LayerNorm((8,))
        self.head = nn.Linear(8, 4)
        self.register_buffer("mask", torch.rand(1, 1, 20, 20) > 0.5)
        self.register_buffer("nothing", None)
        self.register_buffer("table", torch.arange(30, dtype=torch.uint8).reshape(5, 6), persistent=False)
        self.scale = torch.tensor([1.0, 2.0])
        self.enabled, self.sizes = True, [1, 2]

    def forward(self, x):
        x = self.conv(x * self.mask[..., : x.shape[2], : x.shape[3]]) * self.scale.mean()
        return self.head(self.norm(x.mean((2, 3))))


def test_edits_survive_json():
    edits = (
        Keep(size=4, kept=(0, 3), axes=(("conv.weight", 0), ("bn.weight", 0))),
        Attribute(module="conv", name="out_channels", value=2),
        Attribute(module="", name="kernel_size", value=(3, 5)),
        Factor(module="layer.0", rank=3),
        Factor(module="layer.1", rank=3, bias=True, split="spatial"),
        Factor(module="layer.2", rank=3, split="tucker", rank_in=2),
    )
    text = EDITS.dump_json(edits)
    assert EDITS.validate_json(text) == edits


def test_what_was_written_before_there_were_other_splits_keeps_its_bytes():
    for text in (
        b'[{"module":"a","rank":3,"bias":false,"split":"channel","edit":"factor"}]',
        b'[{"module":"a","rank":3,"bias":true,"split":"channel","edit":"factor"}]',
    ):
        assert EDITS.dump_json(EDITS.validate_json(text)) == text
    (edit,) = EDITS.validate_json(b'[{"module":"a","rank":3,"edit":"factor"}]')
    assert edit == Factor(module="a", rank=3, split="channel")


def test_derived_edits_survive_json():
    model, example = network("mobilenet_v2")
    edits = edits_for(model, example, {"features.3.conv.1.0": [0, 5], "features.3.conv.2": [1]})
    assert EDITS.validate_json(EDITS.dump_json(edits)) == edits


@pytest.mark.parametrize(
    "text",
    [
        '[{"edit": "keep", "size": 4, "kept": [], "axes": [["w", 0]]}]',
        '[{"edit": "factor", "module": "a", "rank": 3, "split": "tucker"}]',
        '[{"edit": "factor", "module": "a", "rank": 3, "split": "tucker", "rank_in": 0}]',
        '[{"edit": "factor", "module": "a", "rank": 3, "split": "spatial", "rank_in": 2}]',
        '[{"edit": "factor", "module": "a", "rank": 3, "split": "temporal"}]',
        '[{"edit": "keep", "size": 4, "kept": [-1], "axes": [["w", 0]]}]',
        '[{"edit": "keep", "size": 4, "kept": [0], "axes": []}]',
        '[{"edit": "keep", "size": "4", "kept": [0], "axes": [["w", 0]]}]',
        '[{"edit": "attribute", "module": "m", "name": "__class__", "value": 1}]',
        '[{"edit": "attribute", "module": "m", "name": "a.b", "value": 1}]',
        '[{"edit": "attribute", "module": "m", "name": "size", "value": true}]',
        '[{"edit": "attribute", "module": "m", "name": "size", "value": "os"}]',
        '[{"edit": "factor", "module": "m", "rank": 0}]',
        '[{"edit": "factor", "module": "m", "rank": 1, "more": 1}]',
        '[{"edit": "run", "module": "os"}]',
    ],
)
def test_malformed_edits_are_refused(text):
    with pytest.raises(ValidationError):
        EDITS.validate_json(text)


def test_keep_selects_in_the_order_given():
    model = nn.Sequential(nn.Linear(3, 4))
    before = model[0].weight.detach().clone()
    surgery.apply(model, Keep(size=4, kept=(3, 0), axes=(("0.weight", 0),)))
    assert torch.equal(model[0].weight, before[[3, 0]])
    assert isinstance(model[0].weight, nn.Parameter)
    assert model[0].weight.requires_grad


def test_frozen_parameters_and_buffers_stay_what_they_are():
    model = nn.Sequential(nn.BatchNorm2d(4))
    model[0].weight.requires_grad_(False)
    surgery.apply(model, Keep(size=4, kept=(1,), axes=(("0.weight", 0), ("0.running_var", 0))))
    assert not model[0].weight.requires_grad
    assert not isinstance(model[0].running_var, nn.Parameter)
    assert model[0].running_var.shape == (1,)


def on_meta(model):
    return copy.deepcopy(model).to("meta")


def test_edits_apply_on_meta():
    model, example = network("resnet18")
    edits = [
        *edits_for(model, example, {"conv1": [0, 9], "layer2.0.conv1": [3]}),
        Factor(module="layer3.0.conv2", rank=5),
        Factor(module="fc", rank=2),
        Factor(module="layer3.1.conv1", rank=6, split="spatial"),
        Factor(module="layer4.0.conv1", rank=7, split="tucker", rank_in=3, bias=True),
    ]
    empty = surgery.apply_all(on_meta(model), edits)
    real = surgery.apply_all(model, edits)
    assert all(tensor.is_meta for tensor in empty.parameters())
    shapes = {name: tuple(tensor.shape) for name, tensor in real.state_dict().items()}
    assert {name: tuple(tensor.shape) for name, tensor in empty.state_dict().items()} == shapes
    assert repr(empty) == repr(real)


@pytest.mark.parametrize("width", [3, 40])
def test_a_weight_cut_on_both_axes_at_once_among_many(width):
    # Axes come tensor by tensor; identities of tensors that are gone must not be mistaken for new ones.
    layers = nn.Sequential(*(nn.Conv2d(width, width, 1, bias=False) for _ in range(30)))
    before = [layer.weight.detach().clone() for layer in layers]
    kept = tuple(range(0, width, 2))
    axes = tuple((f"{index}.weight", axis) for index in range(30) for axis in (0, 1))
    surgery.apply(layers, Keep(size=width, kept=kept, axes=axes))
    for layer, old in zip(layers, before, strict=True):
        assert torch.equal(layer.weight, old[list(kept)][:, list(kept)])


def test_tied_tensors_stay_tied():
    model = randomise(Tied())
    before = model.one.weight.detach().clone()
    axes = tuple((f"{name}.weight", axis) for name in ("one", "two") for axis in (0, 1))
    surgery.apply(model, Keep(size=6, kept=(0, 2, 5), axes=axes))
    assert model.one.weight is model.two.weight
    assert torch.equal(model.one.weight, before[[0, 2, 5]][:, [0, 2, 5]])


def test_whatever_users_put_into_modules_is_left_alone():
    model, example = randomise(Oddities()), torch.randn(2, 3, 6, 9)
    edits = edits_for(model, example, {"conv": [0, 7]})
    touched = {name for edit in edits if isinstance(edit, Keep) for name, _ in edit.axes}
    assert touched == {"conv.weight", "conv.bias", "norm.weight", "norm.bias", "head.weight"}
    mask = model.mask.clone()
    surgery.apply_all(model, edits)
    assert model(example).shape == (2, 4)
    assert torch.equal(model.mask, mask)
    assert model.norm.normalized_shape == (6,)


def test_positions_are_exact_beyond_what_a_float_can_count():
    # 2^24 + 1 is no float32; the positions live in the bits.
    model = nn.Sequential(nn.Linear(4099, 4111, bias=False))
    after = copy.deepcopy(model)
    surgery.encode_positions(after)
    after[0].weight = nn.Parameter(after[0].weight.detach()[:, [0, 4097, 4098]][[5, 4110]])
    (columns, rows) = sorted(surgery.derive(model, after), key=lambda edit: edit.size)
    assert (columns.size, columns.kept, columns.axes) == (4099, (0, 4097, 4098), (("0.weight", 1),))
    assert (rows.size, rows.kept, rows.axes) == (4111, (5, 4110), (("0.weight", 0),))


def test_a_tensor_too_large_to_count_is_refused():
    with pytest.raises(CheckpointError, match=re.escape("40,000 torch.float16 elements is too large")):
        surgery.encode_positions(nn.Sequential(nn.Linear(200, 200, bias=False)).half())


def cut_unevenly(after):
    after[0].weight = nn.Parameter(after[0].weight.detach().clone().flatten()[[0, 1, 4, 6]].reshape(2, 2))


def cut_empty(after):
    after[0].weight = nn.Parameter(after[0].weight.detach()[:, :0])


def cut_flat(after):
    after[0].weight = nn.Parameter(after[0].weight.detach()[0])


@pytest.mark.parametrize("cut", [cut_unevenly, cut_empty, cut_flat])
def test_what_is_no_selection_of_slices_is_not_derived(cut):
    model = nn.Sequential(nn.Linear(3, 4, bias=False))
    after = copy.deepcopy(model)
    surgery.encode_positions(after)
    cut(after)
    with pytest.raises(ValueError, match=r"0\.weight"):
        surgery.derive(model, after)


def test_nothing_cut_means_no_edits():
    model = Residual()
    after = copy.deepcopy(model)
    surgery.encode_positions(after)
    assert surgery.derive(model, after) == ()


def keep(name, axis=0, size=12, kept=(0,)):
    return Keep(size=size, kept=kept, axes=((name, axis),))


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (keep("stem.wight"), "'stem.wight'"),
        (keep("steam.weight"), "'steam'"),
        (keep("norm.num_batches_tracked", size=1), "'norm.num_batches_tracked'"),
        (keep("stem.weight", axis=4), "axis 4 of 'stem.weight'"),
        (keep("stem.weight", size=13), "1 of 13 indices of axis 0 of 'stem.weight', whose shape is (12, 3, 3, 5)"),
        (keep("stem.weight", kept=(0, 12)), "'stem.weight'"),
        (keep("stem.forward"), "'stem.forward'"),
        (Attribute(module="steam", name="out_channels", value=1), "'steam'"),
        (Attribute(module="stem", name="out_canals", value=1), "'stem.out_canals'"),
        (Attribute(module="stem", name="training", value=1), "'stem.training'"),
        (Attribute(module="stem", name="kernel_size", value=3), "'stem.kernel_size' to 3"),
        (Attribute(module="stem", name="out_channels", value=(3,)), "'stem.out_channels' to (3,)"),
        (Attribute(module="stem", name="padding_mode", value=3), "'stem.padding_mode'"),
        (Attribute(module="stem", name="forward", value=3), "'stem.forward'"),
        (Factor(module="norm", rank=1), "'norm', a BatchNorm2d"),
        (Factor(module="", rank=1), "'', a Residual"),
        (Factor(module="steam", rank=1), "'steam'"),
        (Factor(module="stem", rank=13), "'stem' with rank 13; its rank is at most 12"),
        (Factor(module="head", rank=10**12), "at most 7"),
        (Factor(module="head", rank=1, split="spatial"), "'head', a Linear, which has no such form"),
        (Factor(module="head", rank=1, split="tucker", rank_in=1), "'head', a Linear, which has no such form"),
        (Factor(module="stem", rank=10, split="spatial"), "'stem' with rank 10; its rank is at most 9"),
        (Factor(module="stem", rank=13, split="tucker", rank_in=3), "'stem' with rank 13; its rank is at most 12"),
        (
            Factor(module="stem", rank=12, split="tucker", rank_in=4),
            "rank 4 of its inputs; beside rank 12 it is at most 3",
        ),
    ],
)
def test_edits_that_do_not_fit_are_refused_by_name(edit, named):
    model = Residual()
    before = repr(model), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=re.escape(named)):
        surgery.apply(model, edit)
    assert repr(model) == before[0]
    assert all(torch.equal(tensor, before[1][name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    "layer", [nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), nn.Conv1d(4, 4, 3)]
)
def test_layers_without_two_factors_are_refused(layer):
    with pytest.raises(CheckpointError, match="has no such form"):
        surgery.apply(nn.Sequential(layer), Factor(module="0", rank=1))


def test_a_factor_keeps_geometry_type_mode_and_the_random_state():
    layer = nn.Conv2d(8, 6, (3, 5), stride=(1, 2), padding=(1, 2), dilation=(2, 1)).double()
    model = nn.Sequential(layer).eval()
    torch.manual_seed(3)
    state = torch.get_rng_state()
    surgery.apply(model, Factor(module="0", rank=4))
    assert torch.equal(torch.get_rng_state(), state)
    first, second = model[0]
    assert (first.in_channels, first.out_channels, second.out_channels) == (8, 4, 6)
    assert (first.kernel_size, first.stride, first.padding, first.dilation) == ((3, 5), (1, 2), (1, 2), (2, 1))
    assert (second.kernel_size, second.stride, second.padding) == ((1, 1), (1, 1), (0, 0))
    assert first.bias is None
    assert second.bias is not None
    assert first.weight.dtype == second.weight.dtype == torch.float64
    assert not first.training


GEOMETRIES = [
    {"stride": (1, 2), "padding": (1, 2), "dilation": (2, 1)},
    {"padding": "same", "dilation": (1, 2)},
    {"padding": "valid", "stride": (2, 3)},
]


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("split", ["spatial", "tucker"])
def test_other_forms_compute_the_layer_at_their_full_ranks(split, bias, geometry):
    layer = randomise(nn.Conv2d(4, 5, (3, 5), bias=bias, **geometry)).double()
    model, inputs = nn.Sequential(layer).eval(), torch.randn(2, 4, 11, 14, dtype=torch.float64)
    edit = {
        "spatial": Factor(module="0", rank=12, split="spatial"),
        "tucker": Factor(module="0", rank=5, split="tucker", rank_in=4),
    }[split]
    with torch.no_grad():
        expected = model(inputs)
        weights = split_spatial(layer.weight, 12) if split == "spatial" else split_tucker(layer.weight, 5, 4)
        surgery.apply(model, edit)
        for part, weight in zip(model[0], weights, strict=True):
            part.weight.copy_(weight)
            assert not part.training
            assert (part.bias is not None) == (bias and part is model[0][-1])
        if bias:
            model[0][-1].bias.copy_(layer.bias)
        torch.testing.assert_close(model(inputs), expected, rtol=0, atol=1e-9)


def test_a_bias_that_the_layer_had_not_goes_to_the_last_part():
    model = nn.Sequential(nn.Conv2d(4, 5, 3, bias=False))
    surgery.apply(model, Factor(module="0", rank=2, split="tucker", rank_in=3, bias=True))
    assert [part.bias is None for part in model[0]] == [True, True, False]
    assert [tuple(part.weight.shape) for part in model[0]] == [(3, 4, 1, 1), (2, 3, 3, 3), (5, 2, 1, 1)]


def test_halves_of_a_factorized_layer_are_known():
    edits = (Factor(module="layer1.0.conv1", rank=2), keep("a.weight"))
    assert surgery.is_factor_of("layer1.0.conv1.0", edits)
    assert surgery.is_factor_of("layer1.0.conv1.1", edits)
    assert not surgery.is_factor_of("layer1.0", edits)
    assert not surgery.is_factor_of("layer1.0.conv2.0", edits)
    assert not surgery.is_factor_of("layer1.0.conv1.10", edits)
    three = (Factor(module="a.conv", rank=2, split="tucker", rank_in=2), Factor(module="b", rank=2, split="spatial"))
    assert [surgery.is_factor_of(f"a.conv.{part}", three) for part in range(4)] == [True, True, True, False]
    assert [surgery.is_factor_of(f"b.{part}", three) for part in range(3)] == [True, True, False]
