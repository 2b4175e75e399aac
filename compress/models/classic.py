"""Small networks of the distillation literature: a multi-layer perceptron, LeNet-5 and AlexNet for small images.

Rectified linear units everywhere, and max pooling in LeNet, where the originals have saturating units and learned
subsampling: that is how these networks are built today. No batch norms, so peak learning rates are small: 0.01 with SGD.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

_ALEXNET_PROPORTIONS = (1, 3, 6, 4, 4)
"""Channels of AlexNet's five convolutions, in parts of the first one's."""
_ALEXNET_HIDDEN = 16
"""Units of AlexNet's hidden linear layers, in channels of its first convolution: 1,024 of them with 64 channels, where the
original for ImageNet has 4,096."""


class MLP(nn.Module):
    """Linear layers with rectified linear units between them; an input of any shape is flattened."""

    def __init__(self, in_features: int, hidden: Sequence[int], num_classes: int = 10) -> None:
        """Take the number of values of an input, and the units of each hidden layer: [256, 256, 256]."""
        super().__init__()
        widths = [in_features, *hidden]
        self.hidden = nn.ModuleList(nn.Linear(*pair) for pair in pairwise(widths))
        self.linear = nn.Linear(widths[-1], num_classes)
        _initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Inputs (n, ...) to logits (n, num_classes)."""
        x = x.flatten(1)
        for layer in self.hidden:
            x = F.relu(layer(x))
        logits: Tensor = self.linear(x)
        return logits


class LeNet5(nn.Module):
    """Two convolutions and three linear layers (LeCun, Bottou, Bengio, Haffner 1998, Proceedings of the IEEE 86, fig. 2)."""

    def __init__(self, num_classes: int = 10, in_channels: int = 3, image_size: int = 32) -> None:
        """Take the channels, and height and width of the images in pixels, at least 16."""
        super().__init__()
        _check_size(image_size, 16)
        self.conv1 = nn.Conv2d(in_channels, 6, 5)
        self.conv2 = nn.Conv2d(6, 16, 5)
        places = ((image_size - 4) // 2 - 4) // 2
        self.linear1 = nn.Linear(16 * places**2, 120)
        self.linear2 = nn.Linear(120, 84)
        self.linear3 = nn.Linear(84, num_classes)
        _initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Images (n, in_channels, image_size, image_size) to logits (n, num_classes)."""
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = F.relu(self.linear2(F.relu(self.linear1(x.flatten(1)))))
        logits: Tensor = self.linear3(x)
        return logits


class SmallAlexNet(nn.Module):
    """AlexNet for images of about 32 pixels: five convolutions, three of them pooled, and three linear layers.

    Kernels of 5, 5, 3, 3 and 3 pixels, all with stride 1, where the original for 224 pixels begins with 11 pixels and stride 4;
    channels in the proportions of Krizhevsky 2014, "One weird trick for parallelizing convolutional neural networks",
    arXiv:1404.5997, which is also torchvision's. Dropout before the hidden linear layers, as in Krizhevsky, Sutskever, Hinton
    2012 (NeurIPS).
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_channels: int = 3,
        image_size: int = 32,
        width: int = 16,
        dropout: float = 0.5,
    ) -> None:
        """Take the channels, the height and width of the images in pixels (at least 8), and the first layer's width."""
        super().__init__()
        _check_size(image_size, 8)
        first, second, third, fourth, fifth = (width * parts for parts in _ALEXNET_PROPORTIONS)
        self.conv1 = nn.Conv2d(in_channels, first, 5, padding=2)
        self.conv2 = nn.Conv2d(first, second, 5, padding=2)
        self.conv3 = nn.Conv2d(second, third, 3, padding=1)
        self.conv4 = nn.Conv2d(third, fourth, 3, padding=1)
        self.conv5 = nn.Conv2d(fourth, fifth, 3, padding=1)
        self.dropout = nn.Dropout(dropout)
        units = _ALEXNET_HIDDEN * width
        self.linear1 = nn.Linear(fifth * (image_size // 8) ** 2, units)
        self.linear2 = nn.Linear(units, units)
        self.linear3 = nn.Linear(units, num_classes)
        _initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Images (n, in_channels, image_size, image_size) to logits (n, num_classes)."""
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = F.relu(self.conv4(F.relu(self.conv3(x))))
        x = F.max_pool2d(F.relu(self.conv5(x)), 2)
        x = F.relu(self.linear1(self.dropout(x.flatten(1))))
        x = F.relu(self.linear2(self.dropout(x)))
        logits: Tensor = self.linear3(x)
        return logits


def _check_size(image_size: int, least: int) -> None:
    if image_size < least:
        raise ValueError(f"images of {image_size} pixels have nothing left behind the pooling; {least} are the least")


def _initialise(model: nn.Module) -> None:
    """Normal weights that keep the variance through rectified units (He et al. 2015, arXiv:1502.01852), biases of zero."""
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            assert module.bias is not None
            nn.init.zeros_(module.bias)


MODELS: Mapping[str, Callable[..., nn.Module]] = {"mlp": MLP, "lenet5": LeNet5, "alexnet": SmallAlexNet}
