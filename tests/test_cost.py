"""Multiply-accumulates and positions against counts by hand, on images that are not square."""

import pytest
import torch
from torch import nn

from compress.models.cost import macs, output_positions, parameters

LAYERS = {
    # layer, input shape of one sample, multiply-accumulates, positions
    "conv": (nn.Conv2d(3, 8, (3, 5), stride=(1, 2), padding=(1, 2)), (3, 6, 10), 8 * 3 * 15 * 6 * 5, 6 * 5),
    "no padding": (nn.Conv2d(3, 8, 3, bias=False), (3, 6, 10), 8 * 27 * 4 * 8, 4 * 8),
    "dilated": (nn.Conv2d(3, 8, 3, dilation=2), (3, 6, 10), 8 * 27 * 2 * 6, 2 * 6),
    "grouped": (nn.Conv2d(8, 12, 3, padding=1, groups=4), (8, 5, 7), 12 * 2 * 9 * 35, 35),
    "depthwise": (nn.Conv2d(8, 8, 3, padding=1, groups=8), (8, 5, 7), 8 * 9 * 35, 35),
    "pointwise": (nn.Conv2d(8, 4, 1), (8, 5, 7), 8 * 4 * 35, 35),
    "one axis": (nn.Conv1d(3, 4, 3), (3, 9), 3 * 4 * 3 * 7, 7),
    "three axes": (nn.Conv3d(2, 3, 2), (2, 3, 4, 5), 2 * 3 * 8 * 2 * 3 * 4, 24),
    "transposed": (nn.ConvTranspose2d(3, 4, 2, stride=2), (3, 5, 7), 3 * 4 * 4 * 35, 35),
    "linear": (nn.Linear(11, 4), (11,), 44, 1),
    "tokens": (nn.Linear(11, 4), (6, 11), 44 * 6, 6),
}


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("kind", LAYERS)
def test_layers_cost_what_hands_count(kind, batch):
    layer, shape, expected, positions = LAYERS[kind]
    model = nn.Sequential(layer)
    example = torch.randn(batch, *shape)
    assert macs(model, (example,)) == expected
    assert output_positions(model, (example,)) == {"0": positions}
    if layer.weight.dim() == 2 or layer.groups == 1:
        assert layer.weight.numel() * positions == expected


def test_a_layer_used_twice_costs_twice():
    layer = nn.Conv2d(3, 3, 3, padding=1)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    example = torch.randn(2, 3, 4, 6)
    assert macs(model, (example,)) == 2 * 81 * 24
    assert output_positions(model, (example,)) == {"0": 48}
    assert parameters(model) == 84


@pytest.mark.parametrize("training", [True, False])
def test_matrix_products_without_a_layer_count_too(training):
    attention = nn.MultiheadAttention(8, 2, batch_first=True)

    class Attend(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = attention

        def forward(self, x):
            return self.attention(x, x, x, need_weights=False)[0]

    model, tokens = Attend().train(training), 5
    expected = 4 * tokens * 8 * 8 + 2 * tokens * tokens * 8
    assert macs(model, (torch.randn(3, tokens, 8),)) == expected
    assert torch.backends.mha.get_fastpath_enabled()


def test_tied_parameters_count_once():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    assert parameters(model) == 16 + 8


def test_counting_leaves_nothing_behind():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    macs(model, (torch.randn(2, 3, 5, 8),))
    output_positions(model, (torch.randn(2, 3, 5, 8),))
    assert all(not module._forward_hooks for module in model.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(RuntimeError):
        output_positions(model, (torch.randn(2, 2, 5, 8),))
    assert all(not module._forward_hooks for module in model.modules())
