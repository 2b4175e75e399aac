"""Networks of random numbers for tests, and what channel surgery should do to them."""

import copy
import functools

import torch
from torch import nn
from torchvision import models
from torchvision.models.vgg import cfgs, make_layers

from compress import surgery
from compress.methods.groups import ChannelGraph, copy_on_cpu, outputs_of
from compress.methods.silence import randomise, silence, what_differs
from compress.models.cifar import CifarResNet

CLASSES = 7


class Residual(nn.Module):
    """A stream of channels whose middle convolution is cut on both sides at once; the ends of every kind."""

    def __init__(self, channels=12):
        super().__init__()
        self.stem = nn.Conv2d(3, channels, (3, 5), padding=(1, 2))
        self.middle = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.head = nn.Linear(channels, CLASSES)

    def forward(self, x):
        x = self.stem(x).relu()
        x = (x + self.norm(self.middle(x))).relu()
        return self.head(x.mean((2, 3)))


class Tied(nn.Module):
    """Two layers with one weight, and a buffer that is neither saved nor made the same twice."""

    def __init__(self, width=6):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.one = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.two = nn.Conv2d(width, width, 3, padding=1)
        self.two.weight = self.one.weight
        self.head = nn.Linear(width, CLASSES)
        self.register_buffer("noise", torch.randn(1, 1, 5, 7), persistent=False)

    def forward(self, x):
        x = x + self.noise
        x = self.stem(x).relu()
        return self.head(self.two(self.one(x).relu()).relu().mean((2, 3)))


class InGroups(nn.Module):
    """Six groups of four channels, a gate over them, and a shortcut around all of it."""

    def __init__(self, channels=24):
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, padding=1)
        self.grouped = nn.Conv2d(channels, channels, 3, padding=1, groups=channels // 4)
        self.norm = nn.BatchNorm2d(channels)
        self.squeeze = nn.Conv2d(channels, 5, 1)
        self.excite = nn.Conv2d(5, channels, 1)
        self.last = nn.Conv2d(channels, 10, 1)
        self.head = nn.Linear(10, CLASSES)

    def forward(self, x):
        x = self.stem(x).relu()
        y = self.norm(self.grouped(x)).relu()
        y = y * self.excite(self.squeeze(y.mean((2, 3), keepdim=True)).relu()).sigmoid()
        return self.head(self.last(x + y).relu().mean((2, 3)))


def vgg11_features():
    """The convolutions of VGG-11 with BatchNorm, and a small head behind a flattened map that is not square."""
    return nn.Sequential(
        make_layers(cfgs["A"], batch_norm=True),
        nn.AdaptiveAvgPool2d((1, 2)),
        nn.Flatten(),
        nn.Linear(512 * 2, 20),
        nn.ReLU(),
        nn.Linear(20, CLASSES),
    )


NETWORKS = {
    "cifar_resnet20": (functools.partial(CifarResNet, 20, CLASSES), (16, 24)),
    "resnet18": (functools.partial(models.resnet18, num_classes=CLASSES), (40, 64)),
    "mobilenet_v2": (functools.partial(models.mobilenet_v2, num_classes=CLASSES), (40, 64)),
    "vgg11_bn": (vgg11_features, (32, 64)),
    "residual": (Residual, (6, 9)),
    "in_groups": (InGroups, (6, 9)),
}


@functools.cache
def _original(name):
    make, size = NETWORKS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = randomise(make())
    return model, torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))


def network(name):
    """A fresh random network in float32 and a batch of inputs for it."""
    model, example = _original(name)
    return copy.deepcopy(model), example.clone()


def groups_of(model, example):
    return {group.name: group for group in ChannelGraph(copy_on_cpu(model), (example,)).groups()}


def cut_by_torch_pruning(model, example, removed, *, encoded=False):
    """A copy that lost channels, by group name; with the positions of what is left for weights where that is asked for."""
    throwaway = copy_on_cpu(model)
    graph = ChannelGraph(throwaway, (example,))
    outputs = outputs_of(list(graph.groups()), removed)
    if encoded:
        surgery.encode_positions(throwaway)
    return graph.remove(outputs)


def edits_for(model, example, removed):
    """What removing channels, by group name, means as edits; as the prune stage finds it."""
    return surgery.derive(model, cut_by_torch_pruning(model, example, removed, encoded=True))


def silenced(model, groups, removed):
    """A copy whose layers answer zero in those channels instead of losing them."""
    quiet = copy.deepcopy(model)
    with torch.no_grad():
        for name, gone in removed.items():
            for item in groups[name].coupled:
                if not item.reads:
                    slices = [s for s, root in zip(item.slices, item.roots, strict=True) if root in gone]
                    quiet.get_parameter(item.tensor).index_fill_(item.axis, torch.tensor(slices, dtype=torch.long), 0)
    return quiet


def difference(model, example, removed, groups=None):
    """What the product says of removing channels from a random model: None, or what is wrong with it."""
    groups = (groups or groups_of(model, example)).values()
    cut = surgery.apply_all(copy.deepcopy(model), edits_for(model, example, removed))
    return what_differs(silence(copy.deepcopy(model), groups, removed), cut, model, (example,))
