"""Several teachers as one."""

import numpy as np
import pytest
import torch
from loss_cases import normal
from scipy.special import softmax

from compress.methods.losses.ensemble import mean_logits, mean_probabilities
from compress.methods.losses.logits import soft_label_loss

WEIGHTS = [2.0, 1.0, 5.0]


def teachers(count=3):
    return [normal(seed, 5, 7, scale=3.0) for seed in range(count)]


def test_mean_logits_is_the_formula():
    expected = np.average([each.numpy() for each in teachers()], axis=0, weights=WEIGHTS)
    assert np.allclose(mean_logits(teachers(), WEIGHTS).numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_mean_probabilities_is_the_formula(temperature):
    expected = np.average([softmax(each.numpy() / temperature, axis=1) for each in teachers()], axis=0, weights=WEIGHTS)
    found = softmax(mean_probabilities(teachers(), WEIGHTS, temperature).numpy() / temperature, axis=1)
    assert np.allclose(found, expected, rtol=1e-12)


def test_the_two_means_differ():
    found = [soft_label_loss(normal(9, 5, 7), mean_logits(teachers(), WEIGHTS), 4.0)]
    found.append(soft_label_loss(normal(9, 5, 7), mean_probabilities(teachers(), WEIGHTS, 4.0), 4.0))
    assert found[0].item() != pytest.approx(found[1].item(), rel=1e-2)


@pytest.mark.parametrize("mean", [mean_logits, lambda each, weights: mean_probabilities(each, weights, 4.0)])
def test_one_teacher_and_teachers_without_weight(mean):
    first = teachers()[0]
    wanted = (first / 4).softmax(1)
    for group, weights in (([first], [0.3]), (teachers(), [2.0, 0.0, 0.0]), ([first, first], [1.0, 3.0])):
        assert torch.allclose((mean(group, weights) / 4).softmax(1), wanted, rtol=1e-12)


def test_sure_teachers_that_disagree_stay_finite():
    sure = [torch.tensor([[1e4, 0.0, -1e4]]), torch.tensor([[-1e4, 0.0, 1e4]])]
    found = mean_probabilities(sure, [1.0, 1.0], 1.0)
    assert torch.isfinite(found).all()
    assert torch.allclose(found.softmax(1), torch.tensor([[0.5, 0.0, 0.5]]))


def test_half_precision_is_averaged_in_single():
    halves = [each.half() for each in teachers()]
    singles = [each.float() for each in halves]
    for mean in (mean_logits, lambda each, weights: mean_probabilities(each, weights, 4.0)):
        assert torch.equal(mean(halves, WEIGHTS), mean(singles, WEIGHTS))


@pytest.mark.parametrize(
    ("weights", "message"), [([1.0], "3 teachers"), ([0.0, 0.0, 0.0], "positive"), ([2.0, -1.0, 1.0], "at least 0")]
)
def test_weights_must_fit(weights, message):
    with pytest.raises(ValueError, match=message):
        mean_logits(teachers(), weights)
    with pytest.raises(ValueError, match=message):
        mean_probabilities(teachers(), weights, 1.0)
