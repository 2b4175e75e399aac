"""What counts as a model's answer, and what the logits in it are."""

from collections import OrderedDict, namedtuple

import pytest
import torch
from torch import nn

from compress.errors import ModelError, StageError
from compress.models.answers import logits_of, outputs_of
from compress.stages.base import check_forward, check_training_forward

LOGITS, OTHER = torch.zeros(2, 4), torch.ones(2, 3)
Scored = namedtuple("Scored", "scores features")
Google = namedtuple("Google", "aux logits")


@pytest.mark.parametrize(
    ("answer", "names"),
    [
        (LOGITS, ["logits"]),
        ({"logits": LOGITS}, ["logits"]),
        (OrderedDict(features=OTHER, logits=LOGITS, cache=None), ["logits", "features"]),
        ((LOGITS,), ["logits"]),
        ([LOGITS, OTHER, OTHER], ["logits", "output_1", "output_2"]),
        ((LOGITS, None, OTHER), ["logits", "output_1"]),
        (Scored(LOGITS, OTHER), ["logits", "features"]),
        (Scored(LOGITS, None), ["logits"]),
        (Google(OTHER, LOGITS), ["logits", "aux"]),
    ],
)
def test_outputs_by_name_logits_first(answer, names):
    found = outputs_of(answer)
    assert list(found) == names
    assert found["logits"] is LOGITS
    assert logits_of(answer) is LOGITS
    assert all(tensor is OTHER for name, tensor in found.items() if name != "logits")


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ("text", "returns a str, not one tensor of logits, nor a mapping or tuple of tensors"),
        (None, "returns a NoneType, not one tensor"),
        ({"scores": LOGITS, "aux": OTHER}, r"returns a dict without the key 'logits' \(its keys are scores, aux\)"),
        ({}, r"returns a dict without the key 'logits' \(it holds no tensor\)"),
        ({1: LOGITS}, "returns a mapping with the key 1; keys must be names"),
        ((), "returns a tuple without a tensor of logits"),
        ((None,), "returns a tuple without a tensor of logits"),
        ((LOGITS, (OTHER, OTHER)), "returns nested outputs: 'output_1' is a tuple; each output must be one tensor"),
        ({"logits": LOGITS, "all": [OTHER]}, "returns nested outputs: 'all' is a list; each output must be"),
        ((LOGITS, 0.5), "returns 'output_1' as a float; each output must be one tensor"),
        (Google(OTHER, None), r"returns a Google without the key 'logits' \(its keys are aux\)"),
    ],
)
def test_other_answers_are_refused(answer, message):
    for look in (outputs_of, logits_of):
        with pytest.raises(ModelError, match=f"^the forward pass {message}"):
            look(answer)


class Model(nn.Module):
    """Answers what `answer` says, in training mode what `training` says."""

    def __init__(self, answer, training=None):
        super().__init__()
        self.answer, self.trains = answer, training or answer

    def forward(self, images, words):
        assert words.dtype is torch.int64
        return self.trains(images) if self.training else self.answer(images)


EXAMPLE = (torch.zeros(2, 4), torch.zeros(2, 7, dtype=torch.int64))


def plain(x):
    return x


def both(x):
    return x, x


@pytest.mark.parametrize("answer", [plain, both, lambda x: {"logits": x, "features": x}])
def test_several_outputs_in_both_modes_are_fine(answer):
    check_forward(Model(answer), EXAMPLE, 4, "model")
    check_training_forward(Model(answer), EXAMPLE, "model")


@pytest.mark.parametrize(
    ("answer", "training", "message"),
    [
        (plain, both, "returns a tuple, not one tensor of logits; switch auxiliary heads off in its kwargs"),
        (both, lambda x: (x, x, x), "returns a tuple, not logits, output_1 as in evaluation mode; switch auxiliary"),
        (plain, lambda x: {"loss": x}, "returns a dict, not one tensor of logits; switch auxiliary"),
    ],
)
def test_more_outputs_in_training_mode_are_refused(answer, training, message):
    with pytest.raises(StageError, match=f"^model: in training mode the forward pass {message}"):
        check_training_forward(Model(answer, training), EXAMPLE, "model")


def test_more_outputs_in_evaluation_mode_are_fine():
    check_training_forward(Model(both, plain), EXAMPLE, "model")


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda x: x @ x, r"fails on inputs of the shapes \(4,\) and \(7,\) of whole numbers: .*shapes cannot be mult"),
        (lambda x: {"scores": x}, "the forward pass returns a dict without the key 'logits'"),
        (lambda x: (x[:, :3], x), r"answers \(2, 3\) for 2 samples, but the data has 4 classes; set its kwargs"),
        (lambda x: (x[0], x), r"answers \(4,\) for 2 samples, but the data has 4 classes$"),
    ],
)
def test_what_is_wrong_with_a_forward_pass_is_said(answer, message):
    with pytest.raises(StageError, match=f"^model: .*{message}"):
        check_forward(Model(answer), EXAMPLE, 4, "model")
