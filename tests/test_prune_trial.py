"""What the prune stage finds out by trying: models whose wires, gates, sizes and weights are not what they seem."""

import numpy as np
import pytest
import torch
from conftest import Workshop, write_arrays

from compress.config import ArraysConfig, ModelConfig
from compress.data.load import load_data
from compress.edits import Attribute
from compress.methods.silence import randomise
from compress.models.cost import parameters
from compress.stages import source

pytestmark = pytest.mark.usefixtures("one_thread")

CODE = '''
import torch
from torch import nn
from torchvision.models import VisionTransformer


class Net(nn.Module):
    """A stem, something in the middle that the subclass does, and a head."""

    def __init__(self, num_classes=4, width=32):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.head = nn.Linear(width, num_classes)

    def forward(self, x):
        return self.head(self.middle(self.stem(x).relu()).mean((2, 3)))


class Whisper(Net):
    """A shuffle of channels in a branch that hardly matters."""

    def __init__(self):
        super().__init__()
        self.one = nn.Conv2d(32, 32, 3, padding=1)
        self.two = nn.Conv2d(32, 32, 3, padding=1)

    def middle(self, x):
        y = self.one(x).relu()
        n, c, h, w = y.shape
        y = y.reshape(n, 4, -1, h, w).transpose(1, 2).reshape(n, c, h, w)
        return x + 1e-4 * self.two(y)


class Loud(Net):
    """Outputs beyond what a float holds."""

    def middle(self, x):
        return (x * 1e4).exp()


class Dark(Net):
    """A branch that is never on."""

    def __init__(self):
        super().__init__()
        self.one = nn.Conv2d(32, 32, 3, padding=1)
        self.two = nn.Conv2d(32, 32, 3, padding=1)

    def middle(self, x):
        return x + self.two((self.one(x) - 1e6).relu())


class Grouped(Net):
    """Groups that make more channels than they read."""

    def __init__(self):
        super().__init__()
        self.grouped = nn.Conv2d(32, 64, 3, padding=1, groups=4)
        self.head = nn.Linear(64, 4)

    def middle(self, x):
        return self.grouped(x).relu()


class Whole(Net):
    """Eight groups of four channels."""

    def __init__(self):
        super().__init__()
        self.grouped = nn.Conv2d(32, 32, 3, padding=1, groups=8)

    def middle(self, x):
        return self.grouped(x).relu()


class Pad(nn.Module):
    """Numbers for images that are no channels, too."""

    def __init__(self):
        super().__init__()
        self.numbers = (0, 0, 0, 0, 10, 6)

    def forward(self, x):
        return nn.functional.pad(x, self.numbers)


class Lambda(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class Padded(Net):
    """A stream of 32 channels that becomes one of 48."""

    def __init__(self, pad):
        super().__init__()
        self.one = nn.Conv2d(32, 48, 3, padding=1)
        self.pad = pad
        self.head = nn.Linear(48, 4)

    def middle(self, x):
        return (self.one(x) + self.pad(x)).relu()


def padded():
    return Padded(Pad())


def closed():
    return Padded(Lambda(lambda x: nn.functional.pad(x, (0, 0, 0, 0, 10, 6))))


class Inline(Padded):
    def __init__(self):
        super().__init__(None)

    def middle(self, x):
        return (self.one(x) + nn.functional.pad(x, (0, 0, 0, 0, 10, 6))).relu()


class Normed(Net):
    def __init__(self):
        super().__init__()
        self.one = nn.utils.parametrizations.weight_norm(nn.Conv2d(32, 24, 3, padding=1, bias=False))
        self.two = nn.Conv2d(24, 32, 3, padding=1)

    def middle(self, x):
        return self.two(self.one(x).relu()).relu()


class Twice(Net):
    """One layer under two names."""

    def __init__(self):
        super().__init__()
        self.one = nn.Conv2d(32, 32, 3, padding=1)
        self.again = self.one

    def middle(self, x):
        return self.again(self.one(x).relu()).relu()


class Remembers(Net):
    """One of three equal numbers is the width."""

    def __init__(self):
        super().__init__()
        self.hidden, self.topk, self.longest = 32, 32, 32

    def middle(self, x):
        if self.training:
            assert self.topk == 32
        return x.reshape(len(x), self.hidden, 16, 16)


def vit(num_classes=4):
    return VisionTransformer(16, 8, 1, 6, 48, 48, num_classes=num_classes)


whisper, loud, dark, grouped, normed, twice, remembers = Whisper, Loud, Dark, Grouped, Normed, Twice, Remembers
whole, inline = Whole, Inline
'''


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("trial")
    (root / "nets.py").write_text(CODE)
    rng = np.random.default_rng(0)

    def images(n):
        return rng.integers(0, 256, (n, 16, 16, 3), dtype=np.uint8), np.arange(n) % 4

    data = write_arrays(root / "data", train=images(16), validation=images(8), test=images(8))
    settings = {"kind": "arrays", "root": str(data), "validation": {"from": "given"}}
    return root, load_data(ArraysConfig.model_validate(settings, strict=False), 0)


@pytest.fixture
def pruned(place, tmp_path):
    """Prune a network of the file; what came in, what was handed back, what was said, and the workshop."""

    def prune(name, **settings):
        root, data = place
        factory = f"{root / 'nets.py'}:{name}"
        shop = Workshop(tmp_path / "checkpoints", data, factory, frozenset({factory}))
        draft = source.make(ModelConfig(factory=factory), 0)
        randomise(draft.model)
        parent = shop._keep(draft, ())
        draft, context = shop.draft(parent, "prune", **{"target": {"ratio": 0.5}, "recovery": None, **settings})
        saved = shop._keep(draft, ())
        inputs = next(iter(data.test.batches(8))).inputs
        with torch.no_grad():
            again, before = shop.build(saved)(*inputs), draft.model(*inputs)
        torch.testing.assert_close(again, before, rtol=0, atol=0, equal_nan=True)
        return shop.build(parent), draft, context, shop

    return prune


def left_alone(context):
    return {
        text.split("'")[1]: text.partition("breaks the model: ")[2] for text in context.warnings if "left alone" in text
    }


def test_a_wrong_wire_shows_however_little_its_branch_matters(pruned):
    _, draft, context, _ = pruned("whisper")
    assert left_alone(context) == {"one": "without them it computes something else than with them silenced"}
    assert draft.model.one.out_channels == 32
    assert draft.model.stem.out_channels == 16


def test_where_the_trial_can_tell_nothing_the_group_is_left_alone(pruned):
    _, draft, context, _ = pruned("loud")
    assert left_alone(context) == {"stem": "a trial with random weights cannot tell: the outputs are not finite"}
    assert draft.edits == ()
    _, draft, context, _ = pruned("dark")
    (reason,) = {reason for name, reason in left_alone(context).items() if name == "one"}
    assert "cannot tell: they make no difference to the outputs for 4 training samples" in reason
    assert draft.model.one.out_channels == 32
    assert draft.model.stem.out_channels == 16


def test_channels_that_an_unknown_layer_reads_are_named_and_those_that_are_outputs_are_not(pruned):
    _, _, context, _ = pruned("grouped")
    assert left_alone(context)["stem"] == "what reads them is no layer that this tool knows to cut"
    assert "head" not in left_alone(context)  # that it is the output is no surprise


def test_whole_groups_of_a_convolution_go(pruned):
    _, draft, context, _ = pruned("whole")
    assert left_alone(context) == {}
    assert (draft.model.grouped.groups, draft.model.grouped.in_channels, draft.model.stem.out_channels) == (4, 16, 16)
    assert draft.model.grouped.weight.shape == (16, 4, 3, 3)


def test_channels_are_pruned_through_a_pad_that_a_module_holds_and_others_are_told_how(pruned):
    _, draft, context, _ = pruned("padded")
    assert left_alone(context) == {}
    before, after = draft.model.pad.numbers[4:]
    assert draft.model.pad.numbers[:4] == (0, 0, 0, 0)
    assert before + after == 8
    assert (draft.model.stem.out_channels, draft.model.head.in_features) == (16, 24)
    for name, who in (("closed", "'pad'"), ("inline", "the forward pass")):
        _, draft, context, _ = pruned(name)
        (reason,) = set(left_alone(context).values())
        assert f"; {who} pads the channels by 10 and 6, and nothing can change that; a module that only pads" in reason
        assert draft.edits == ()


def test_layers_that_compute_their_weight_are_left_alone_by_prune_and_factorize(pruned):
    whole, draft, context, shop = pruned("normed")
    reasons = left_alone(context)
    assert (
        {name for name, reason in reasons.items() if "'one' computes its weight" in reason} == reasons.keys() != set()
    )
    assert parameters(draft.model) < parameters(whole)
    parent = shop._keep(draft, ())
    split, context = shop.draft(parent, "factorize", target={"ratio": 0.2}, min_saving=0.01)
    assert {edit.module for edit in split.edits[len(draft.edits) :]} == {"stem", "two"}


def test_a_layer_of_two_names_is_cut_once(pruned):
    _, draft, context, _ = pruned("twice")
    assert left_alone(context) == {}
    assert draft.model.one is draft.model.again
    assert draft.model.one.weight.shape == (16, 16, 3, 3)


def test_only_the_sizes_that_are_needed_change_and_are_told(pruned):
    _, draft, context, _ = pruned("remembers")
    assert [edit for edit in draft.edits if isinstance(edit, Attribute) and edit.module == ""] == [
        Attribute(module="", name="hidden", value=16)
    ]
    assert "the model's 'hidden' becomes 16" in context.notes
    assert (draft.model.topk, draft.model.longest) == (32, 32)


@pytest.mark.parametrize("ratio", [0.5, 0.4, 0.3])
def test_two_groups_of_one_width_may_become_different(pruned, ratio):
    whole, draft, context, _ = pruned("vit", target={"ratio": ratio}, multiple=8)
    assert left_alone(context) == {}
    assert draft.model.hidden_dim == draft.model.conv_proj.out_channels < 48
    assert parameters(draft.model) < 0.8 * parameters(whole)
