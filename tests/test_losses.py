"""Losses against independent formulas, their gradients and their limits."""

import jaxtyping
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import log_softmax

from compress.methods.losses import label_loss, soft_label_loss

TEMPERATURES = [0.5, 1.0, 4.0, 20.0]


def logits(seed, n=5, classes=7, scale=3.0):
    return torch.randn(n, classes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_soft_label_loss_is_the_formula(temperature):
    student, teacher = logits(0), logits(1)
    log_q = log_softmax(student.numpy() / temperature, axis=1)
    log_p = log_softmax(teacher.numpy() / temperature, axis=1)
    expected = temperature**2 * np.mean(np.sum(np.exp(log_p) * (log_p - log_q), axis=1))
    assert soft_label_loss(student, teacher, temperature).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_soft_label_loss_has_the_right_gradient(temperature):
    student, teacher = logits(2, n=3, classes=5).requires_grad_(), logits(3, n=3, classes=5)
    assert torch.autograd.gradcheck(lambda s: soft_label_loss(s, teacher, temperature), student)


@given(st.integers(0, 1000), st.floats(0.1, 100), st.floats(-50, 50))
def test_a_student_that_agrees_up_to_a_constant_loses_nothing(seed, temperature, shift):
    teacher = logits(seed)
    assert soft_label_loss(teacher + shift, teacher, temperature).item() == pytest.approx(0, abs=1e-8)


@given(st.integers(0, 1000), st.floats(0.1, 100))
def test_disagreement_costs(seed, temperature):
    assert soft_label_loss(logits(seed), logits(seed + 1), temperature).item() > 0


def test_a_high_temperature_matches_centred_logits():
    student, teacher = logits(4), logits(5)
    difference = (student - student.mean(1, keepdim=True)) - (teacher - teacher.mean(1, keepdim=True))
    expected = difference.square().sum(1).mean().item() / (2 * student.shape[1])
    assert soft_label_loss(student, teacher, 1e4).item() == pytest.approx(expected, rel=1e-3)


def test_the_gradient_keeps_its_size_when_the_temperature_grows():
    sizes = []
    for temperature in (10.0, 100.0):
        student = logits(6).requires_grad_()
        soft_label_loss(student, logits(7), temperature).backward()
        sizes.append(student.grad.norm().item())
    assert sizes[1] == pytest.approx(sizes[0], rel=0.2)


def test_extreme_logits_stay_finite():
    student, teacher = torch.tensor([[1e4, -1e4, 0.0]]), torch.tensor([[-1e4, 1e4, 0.0]])
    assert torch.isfinite(soft_label_loss(student, teacher, 1.0))


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_label_loss_is_the_formula(smoothing):
    answers, labels = logits(8), torch.tensor([0, 6, 3, 3, 1])
    log_q = log_softmax(answers.numpy(), axis=1)
    target = np.eye(7)[labels.numpy()] * (1 - smoothing) + smoothing / 7
    expected = -np.mean(np.sum(target * log_q, axis=1))
    assert label_loss(answers, labels, smoothing).item() == pytest.approx(expected, rel=1e-12)


def test_shapes_are_checked_in_tests():
    with pytest.raises(jaxtyping.TypeCheckError):
        soft_label_loss(logits(0), logits(0, classes=6), 1.0)
    with pytest.raises(jaxtyping.TypeCheckError):
        label_loss(logits(0), torch.zeros(4, dtype=torch.int64))
