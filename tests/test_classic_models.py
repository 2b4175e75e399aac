"""The small networks of the literature: sizes that can be counted by hand, answers that can be computed by hand."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision import models

from compress.errors import ModelError
from compress.methods.groups import ChannelGraph, copy_on_cpu
from compress.models.cost import macs, parameters
from compress.models.factory import Arch, create

pytestmark = pytest.mark.usefixtures("one_thread")

TEACHER = {"in_features": 64, "hidden": [256, 256, 256]}
ALEXNET = (1_216, 19_248, 41_568, 55_360, 36_928, 262_400, 65_792, 2_570)


def made(name, **kwargs):
    return create(Arch(f"classic:{name}", kwargs), seed=0).eval()


def noise(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("name", "kwargs", "shape", "expected"),
    [
        ("mlp", TEACHER, (64,), 64 * 256 + 2 * 256 * 256 + 256 * 10 + 3 * 256 + 10),
        ("mlp", {"in_features": 64, "hidden": [128]}, (1, 8, 8), 64 * 128 + 128 * 10 + 128 + 10),
        ("mlp", {"in_features": 6, "hidden": [], "num_classes": 4}, (2, 3), 6 * 4 + 4),
        ("lenet5", {"in_channels": 1}, (1, 32, 32), 61_706),
        ("lenet5", {}, (3, 32, 32), 61_706 + 2 * 6 * 25),
        ("lenet5", {"image_size": 28, "num_classes": 4}, (3, 28, 28), 62_006 - (25 - 16) * 16 * 120 - 6 * 85),
        ("alexnet", {}, (3, 32, 32), sum(ALEXNET)),
        ("alexnet", {"image_size": 8, "width": 4, "num_classes": 3}, (3, 8, 8), None),
    ],
)
def test_sizes_and_shapes(name, kwargs, shape, expected):
    model = made(name, **kwargs)
    assert model(noise(2, *shape)).shape == (2, kwargs.get("num_classes", 10))
    assert expected is None or parameters(model) == expected


def test_the_multiply_accumulates_of_lenet_are_those_of_its_layers():
    layers = 28 * 28 * 6 * 25 + 10 * 10 * 16 * 6 * 25 + 400 * 120 + 120 * 84 + 84 * 10
    assert macs(made("lenet5", in_channels=1), (torch.zeros(1, 1, 32, 32),)) == layers


def test_a_wide_alexnet_has_the_channels_of_torchvisions():
    ours, theirs = (
        [layer.out_channels for layer in model.modules() if isinstance(layer, nn.Conv2d)]
        for model in (made("alexnet", width=64), models.alexnet())
    )
    assert ours == theirs


def test_a_perceptron_is_products_with_nothing_negative_in_between():
    model, x = made("mlp", in_features=6, hidden=[5, 4], num_classes=3), noise(7, 2, 3)
    state = model.state_dict()
    for layer in ("hidden.0", "hidden.1"):
        x = (x.flatten(1) @ state[f"{layer}.weight"].T + state[f"{layer}.bias"]).clamp(min=0)
    expected = x @ state["linear.weight"].T + state["linear.bias"]
    assert torch.allclose(model(noise(7, 2, 3)), expected, atol=1e-6)


def test_lenet_is_its_layers_in_a_row():
    model, x = made("lenet5"), noise(3, 3, 32, 32)
    row = nn.Sequential(
        *(model.conv1, nn.ReLU(), nn.MaxPool2d(2)),
        *(model.conv2, nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        *(model.linear1, nn.ReLU(), model.linear2, nn.ReLU(), model.linear3),
    )
    assert torch.equal(model(x), row(x))


def test_alexnet_drops_units_while_it_learns_only():
    model, x = made("alexnet"), noise(2, 3, 32, 32)
    assert torch.equal(model(x), model(x))
    assert not torch.equal(model.train()(x), model(x))
    assert torch.equal(*(made("alexnet", dropout=0.0).train()(x) for _ in range(2)))


@pytest.mark.parametrize("name", ["lenet5", "alexnet"])
def test_a_new_network_neither_explodes_nor_fades(name):
    logits = made(name)(noise(64, 3, 32, 32)).detach()
    assert 0.1 < float(logits.std()) < 10
    assert float(F.cross_entropy(logits, torch.arange(64) % 10)) < 10


@pytest.mark.parametrize(
    ("name", "kwargs", "shape", "groups"),
    [
        ("mlp", TEACHER, (64,), {"hidden.0", "hidden.1", "hidden.2"}),
        ("lenet5", {}, (3, 32, 32), {"conv1", "conv2", "linear1", "linear2"}),
        ("alexnet", {"width": 4}, (3, 32, 32), {"conv1", "conv2", "conv3", "conv4", "conv5", "linear1", "linear2"}),
    ],
)
def test_all_channels_but_the_classes_can_be_pruned(name, kwargs, shape, groups):
    model = made(name, **kwargs)
    found = {group.name: group for group in ChannelGraph(copy_on_cpu(model), (noise(2, *shape),)).groups()}
    assert groups <= found.keys()


@pytest.mark.parametrize(
    ("factory", "kwargs", "expected"),
    [
        ("classic:lenet", {}, "there is no 'classic:lenet'; did you mean 'lenet5'?"),
        ("clasic:lenet5", {}, "did you mean 'classic'?"),
        ("classic:mlp", {}, r"'classic:mlp' refuses its kwargs: .*'in_features' and 'hidden'"),
        ("classic:mlp", {"in_features": 4, "layers": [3]}, r"it takes in_features, hidden, num_classes"),
        ("classic:lenet5", {"image_size": 15}, "'classic:lenet5' fails .*images of 15 pixels .*; 16 are the least"),
        ("classic:alexnet", {"image_size": 7}, "'classic:alexnet' fails .*images of 7 pixels .*; 8 are the least"),
    ],
)
def test_what_cannot_be_made_is_told(factory, kwargs, expected):
    with pytest.raises(ModelError, match=expected):
        create(Arch(factory, kwargs), seed=0)


def test_they_are_built_in_and_need_no_trust():
    assert not Arch("classic:lenet5").is_code()
