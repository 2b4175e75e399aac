"""Losses on logits against independent formulas, and their limits."""

import jaxtyping
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import log_softmax, softmax
from scipy.stats import entropy as entropy_of
from scipy.stats import pearsonr, zscore

from compress.methods.losses import label_loss, soft_label_loss
from compress.methods.losses.logits import (
    decoupled,
    dist,
    entropy,
    logit_mse,
    soft_cross_entropy,
    standardize,
    teacher_label_loss,
)

TEMPERATURES = [0.5, 1.0, 4.0, 20.0]
LABELS = torch.tensor([0, 6, 3, 3, 1])


def from_probabilities(probabilities, temperature):
    """Logits whose softmax at the temperature is `probabilities`."""
    return temperature * probabilities.clamp(min=torch.finfo(probabilities.dtype).tiny).log()


def logits(seed, n=5, classes=7, scale=3.0):
    return torch.randn(n, classes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_soft_label_loss_is_the_formula(temperature):
    student, teacher = logits(0), logits(1)
    log_q = log_softmax(student.numpy() / temperature, axis=1)
    log_p = log_softmax(teacher.numpy() / temperature, axis=1)
    expected = temperature**2 * np.mean(np.sum(np.exp(log_p) * (log_p - log_q), axis=1))
    assert soft_label_loss(student, teacher, temperature).item() == pytest.approx(expected, rel=1e-12)


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


def test_the_numbers_of_earlier_versions_stay():
    student, teacher = logits(30).float(), logits(31).float()
    log_q, log_p = torch.log_softmax(student / 4.0, 1), torch.log_softmax(teacher / 4.0, 1)
    before = torch.nn.functional.kl_div(log_q, log_p, reduction="batchmean", log_target=True) * 4.0**2
    assert torch.equal(soft_label_loss(student, teacher, 4.0), before)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_soft_cross_entropy_is_the_formula(temperature):
    student, teacher = logits(9), logits(10)
    p = softmax(teacher.numpy() / temperature, axis=1)
    log_q = log_softmax(student.numpy() / temperature, axis=1)
    expected = -(temperature**2) * np.mean(np.sum(p * log_q, axis=1))
    assert soft_cross_entropy(student, teacher, temperature).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_soft_cross_entropy_is_the_divergence_plus_the_entropy_of_the_teacher(temperature):
    student, teacher = logits(9).requires_grad_(), logits(10)
    divergence = soft_label_loss(student, teacher, temperature)
    crossed = soft_cross_entropy(student, teacher, temperature)
    more = temperature**2 * entropy(teacher / temperature)
    assert (crossed - divergence).item() == pytest.approx(more.item(), rel=1e-9)
    gradients = [torch.autograd.grad(loss, student)[0] for loss in (divergence, crossed)]
    assert torch.allclose(*gradients, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_probabilities_become_logits_at_their_temperature(temperature):
    teacher = logits(11)
    given = from_probabilities((teacher / temperature).softmax(1), temperature)
    losses = [soft_label_loss(logits(12), each, temperature).item() for each in (teacher, given)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_probabilities_of_zero_cost_a_finite_price(temperature):
    sure = torch.tensor([[1.0, 0.0, 0.0]])
    student = torch.tensor([[2.0, -1.0, 0.5]])
    found = soft_label_loss(student, from_probabilities(sure, temperature), temperature).item()
    assert found == pytest.approx(-(temperature**2) * log_softmax(student[0] / temperature)[0].item(), rel=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_teacher_label_loss_is_the_formula(smoothing):
    student, teacher = logits(13), logits(14)
    log_q = log_softmax(student.numpy(), axis=1)
    losses = []
    for row, wanted in zip(log_q, teacher.numpy().argmax(1), strict=True):
        target = np.full(7, smoothing / 7)
        target[wanted] += 1 - smoothing
        losses.append(-target @ row)
    assert teacher_label_loss(student, teacher, smoothing).item() == pytest.approx(np.mean(losses), rel=1e-12)


def test_only_the_teachers_favourite_counts():
    teacher = logits(15)
    assert teacher_label_loss(logits(16), teacher, 0.0) == teacher_label_loss(logits(16), 9 * teacher - 4, 0.0)


def test_logit_mse_is_the_formula():
    student, teacher = logits(17).numpy(), logits(18).numpy()
    losses = [np.var(s - t) for s, t in zip(student, teacher, strict=True)]
    found = logit_mse(torch.from_numpy(student), torch.from_numpy(teacher)).item()
    assert found == pytest.approx(np.mean(losses), rel=1e-12)


def test_logit_mse_of_the_papers_has_the_means_besides():
    student, teacher = logits(17), logits(18)
    published = (student - teacher).square().sum(1).mean() / 7
    means = (student.mean(1) - teacher.mean(1)).square().mean()
    assert logit_mse(student, teacher).item() == pytest.approx((published - means).item(), rel=1e-12)


def test_logit_mse_is_twice_what_a_high_temperature_gives():
    student, teacher = logits(19), logits(20)
    assert logit_mse(student, teacher).item() == pytest.approx(
        2 * soft_label_loss(student, teacher, 1e4).item(), rel=1e-3
    )


def test_standardize_is_the_z_score():
    rows = logits(21)
    assert np.allclose(standardize(rows).numpy(), zscore(rows.numpy(), axis=1), rtol=1e-12)


@given(st.integers(0, 1000), st.floats(0.01, 100), st.floats(-50, 50))
def test_standardized_distillation_ignores_shift_and_scale(seed, scale, shift):
    student, teacher = standardize(logits(seed)), logits(seed + 1)
    loss = soft_label_loss(student, standardize(teacher), 2.0).item()
    assert soft_label_loss(student, standardize(scale * teacher + shift), 2.0).item() == pytest.approx(loss, rel=1e-6)


@pytest.mark.parametrize(("alpha", "beta", "temperature"), [(1.0, 8.0, 4.0), (0.3, 2.0, 1.0), (2.0, 0.0, 0.7)])
def test_decoupled_is_the_formula(alpha, beta, temperature):
    student, teacher = logits(22), logits(23)
    losses = []
    for s, t, label in zip(student.numpy(), teacher.numpy(), LABELS.numpy(), strict=True):
        q, p = softmax(s / temperature), softmax(t / temperature)
        target = entropy_of([p[label], 1 - p[label]], [q[label], 1 - q[label]])
        others = entropy_of(np.delete(p, label), np.delete(q, label))  # scipy divides by the sums
        losses.append(temperature**2 * (alpha * target + beta * others))
    found = decoupled(student, teacher, LABELS, alpha, beta, temperature).item()
    assert found == pytest.approx(np.mean(losses), rel=1e-10)


@given(st.integers(0, 1000), st.floats(0.3, 20))
def test_decoupled_contains_soft_labels(seed, temperature):
    student, teacher = logits(seed), logits(seed + 1)
    unsure = 1 - (teacher / temperature).softmax(1).gather(1, LABELS[:, None])[:, 0]
    parts = [
        decoupled(student[[i]], teacher[[i]], LABELS[[i]], 1.0, float(unsure[i]), temperature).item() for i in range(5)
    ]
    whole = soft_label_loss(student, teacher, temperature).item()
    assert np.mean(parts) == pytest.approx(whole, rel=1e-9, abs=1e-12)


def test_decoupled_learns_from_a_teacher_that_is_all_but_sure():
    teacher = torch.tensor([[60.0, 1.0, 0.0, -1.0]])
    student = torch.tensor([[60.0, -1.0, 0.0, 1.0]])
    label = torch.tensor([0])
    assert soft_label_loss(student, teacher, 1.0).item() == pytest.approx(0, abs=1e-12)
    expected = entropy_of(softmax([1.0, 0, -1]), softmax([-1.0, 0, 1]))
    assert decoupled(student, teacher, label, 1.0, 1.0, 1.0).item() == pytest.approx(expected, rel=1e-5)


def test_two_classes_leave_nothing_besides_the_target():
    student, teacher = logits(24, classes=2), logits(25, classes=2)
    labels = torch.tensor([0, 1, 1, 0, 1])
    found = decoupled(student, teacher, labels, 1.0, 8.0, 2.0).item()
    assert found == pytest.approx(soft_label_loss(student, teacher, 2.0).item(), rel=1e-10)


@pytest.mark.parametrize(("beta", "gamma", "temperature"), [(1.0, 2.0, 4.0), (0.7, 0.0, 1.0), (0.0, 1.3, 1.0)])
def test_dist_is_the_formula(beta, gamma, temperature):
    student, teacher = logits(26), logits(27)
    q, p = softmax(student.numpy() / temperature, axis=1), softmax(teacher.numpy() / temperature, axis=1)
    inter = np.mean([1 - pearsonr(a, b).statistic for a, b in zip(q, p, strict=True)])
    intra = np.mean([1 - pearsonr(a, b).statistic for a, b in zip(q.T, p.T, strict=True)])
    found = dist(student, teacher, beta, gamma, temperature).item()
    assert found == pytest.approx(beta * inter + gamma * intra, rel=1e-9)


@given(st.integers(0, 1000), st.floats(0.05, 1.0))
def test_dist_between_classes_ignores_how_sure_a_row_is(seed, factor):
    # factor · p + (1 - factor) / classes: a positive affine map of each row that keeps the sum.
    student, teacher = logits(seed), logits(seed + 1)
    factors = factor ** torch.arange(1, 6, dtype=torch.float64)[:, None].div(5)
    paler = from_probabilities(factors * teacher.softmax(1) + (1 - factors) / 7, 1.0)
    assert dist(student, paler, 1.0, 0.0, 1.0).item() == pytest.approx(
        dist(student, teacher, 1.0, 0.0, 1.0).item(), rel=1e-6
    )


def test_dist_within_classes_ignores_how_frequent_a_class_is():
    teacher = logits(28)
    p = teacher.softmax(1)
    factors = torch.tensor([1.0, 0.1, 0.5, 0.3, 0.9, 0.2, 0.7], dtype=torch.float64)
    # A factor per class, the rest to an eighth class: the columns of the first seven stay correlated as they were.
    rarer, wanted = (torch.cat([each, 1 - each.sum(1, keepdim=True)], 1) for each in (p * factors, p * factors.flip(0)))
    losses = [1 - pearsonr(rarer[:, column], wanted[:, column]).statistic for column in range(8)]
    found = dist(from_probabilities(rarer, 1.0), from_probabilities(wanted, 1.0), 0.0, 1.0, 1.0).item()
    assert np.allclose(losses[:7], 0, atol=1e-12)
    assert losses[7] > 1e-3
    assert found == pytest.approx(losses[7] / 8, rel=1e-9)


def test_dist_sees_classes_that_are_next_to_impossible():
    student, teacher = logits(29).float(), logits(30).float()
    student[:, 2] -= 50
    teacher[:, 2] -= 50
    exact = dist(student.double(), teacher.double(), 0.0, 1.0, 1.0).item()
    assert dist(student, teacher, 0.0, 1.0, 1.0).item() == pytest.approx(exact, rel=1e-4)


def test_rows_that_say_nothing_correlate_with_nothing():
    flat = torch.full((5, 7), 0.3)
    assert dist(flat, logits(31).float(), 1.0, 0.0, 1.0).item() == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_label_loss_is_the_formula(smoothing):
    answers, labels = logits(8), LABELS
    log_q = log_softmax(answers.numpy(), axis=1)
    target = np.eye(7)[labels.numpy()] * (1 - smoothing) + smoothing / 7
    expected = -np.mean(np.sum(target * log_q, axis=1))
    assert label_loss(answers, labels, smoothing).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_label_loss_takes_probabilities(smoothing):
    answers, targets = logits(32), logits(33).softmax(1)
    target = targets.numpy() * (1 - smoothing) + smoothing / 7
    expected = -np.mean(np.sum(target * log_softmax(answers.numpy(), axis=1), axis=1))
    assert label_loss(answers, targets, smoothing).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_certain_probabilities_are_labels(smoothing):
    certain = torch.nn.functional.one_hot(LABELS, 7).double()
    losses = [label_loss(logits(34), targets, smoothing).item() for targets in (LABELS, certain)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)


def test_entropy_is_the_formula():
    answers = logits(35)
    expected = np.mean(entropy_of(softmax(answers.numpy(), axis=1), axis=1))
    assert entropy(answers).item() == pytest.approx(expected, rel=1e-12)


def test_entropy_runs_from_sure_to_undecided():
    assert entropy(torch.tensor([[1e4, 0.0, -1e4]])).item() == 0
    assert entropy(torch.zeros(2, 7)).item() == pytest.approx(np.log(7))


def test_shapes_are_checked_in_tests():
    with pytest.raises(jaxtyping.TypeCheckError):
        soft_label_loss(logits(0), logits(0, classes=6), 1.0)
    with pytest.raises(jaxtyping.TypeCheckError):
        label_loss(logits(0), torch.zeros(4, dtype=torch.int64))
    with pytest.raises(jaxtyping.TypeCheckError):
        dist(logits(0), logits(0, n=4), 1.0, 1.0, 1.0)
