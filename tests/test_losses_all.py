"""What holds for every loss: gradients, limits, precision, and that it can be compiled."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from loss_cases import CASES, FEATURES, LABELS, N

ALL = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
COMPILED = """
import torch
from loss_cases import CASES, LABELS

for name, case in CASES.items():
    student, teacher = case.tensors()
    found = []
    for loss in (case.loss, torch.compile(case.loss, backend="aot_eager", fullgraph=True)):
        leaf = student.clone().requires_grad_()
        value = loss(leaf, teacher, LABELS)
        (gradient,) = torch.autograd.grad(value, leaf)
        found.append((value.detach(), gradient))
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-12, msg=lambda text: f"{name}: {text}")
    torch.compiler.reset()
print(f"compiled {len(CASES)}")
"""


def gradient_of(case, student, teacher, labels=LABELS):
    leaf = student.clone().requires_grad_()
    loss = case.loss(leaf, teacher, labels)
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]


@ALL
def test_the_gradient_is_that_of_the_value(case):
    student, teacher = case.tensors()
    assert torch.autograd.gradcheck(lambda s: case.loss(s, teacher, LABELS), student.requires_grad_())


@ALL
def test_it_is_a_scalar_that_the_student_can_lower(case):
    student, teacher = case.tensors()
    loss, gradient = gradient_of(case, student, teacher)
    assert loss.shape == ()
    assert gradient.norm() > 1e-4
    step = 1e-4 * gradient / gradient.norm()
    assert case.loss(student - step, teacher, LABELS) < loss


@ALL
def test_the_order_of_the_samples_does_not_matter(case):
    student, teacher = case.tensors()
    order = torch.tensor([3, 0, 4, 1, 2])
    turned = case.loss(student[order], teacher[order], LABELS[order])
    assert turned.item() == pytest.approx(case.loss(student, teacher, LABELS).item(), rel=1e-12)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.least is not None])
def test_a_student_like_its_teacher_loses_nothing_and_learns_nothing(name):
    case = CASES[name]
    loss, gradient = gradient_of(case, case.tensors()[1], case.tensors()[1])
    assert loss.item() == pytest.approx(0, abs=1e-12)
    assert gradient.abs().max() < 1e-7


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.least is not None])
def test_any_other_student_loses_something(name):
    student, teacher = CASES[name].tensors()
    assert CASES[name].loss(student, teacher, LABELS) > 1e-3


@ALL
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_finite_and_near_single(case, dtype):
    student, teacher = (tensor.to(dtype) for tensor in case.tensors())
    with torch.autocast("cpu", dtype):
        loss, gradient = gradient_of(case, student, teacher)
    exact, _ = gradient_of(case, student.float(), teacher.float())
    assert torch.isfinite(gradient).all()
    assert loss.item() == pytest.approx(exact.item(), rel=2e-2)


@pytest.mark.parametrize("name", FEATURES)
def test_products_keep_single_precision_under_autocast(name):
    case = CASES[name]
    student, teacher = (tensor.float() for tensor in case.tensors())
    with torch.autocast("cpu", torch.bfloat16):
        loss = case.loss(student, teacher, LABELS)
    assert loss.item() == pytest.approx(case.loss(student, teacher, LABELS).item(), rel=1e-6)


@pytest.mark.parametrize("name", [name for name in FEATURES if name != "hint"])
def test_large_half_precision_features_do_not_overflow(name):
    case = CASES[name]
    student, teacher = ((1e4 * tensor).clamp(-6e4, 6e4).half() for tensor in case.tensors())
    loss, gradient = gradient_of(case, student, teacher)
    assert 0 < loss < 10
    assert torch.isfinite(gradient).all()


@ALL
def test_single_precision_agrees_with_double(case):
    student, teacher = case.tensors()
    exact, exact_gradient = gradient_of(case, student, teacher)
    loss, gradient = gradient_of(case, student.float(), teacher.float())
    assert loss.item() == pytest.approx(exact.item(), rel=1e-5)
    assert torch.allclose(gradient.double(), exact_gradient, rtol=1e-3, atol=1e-4 * exact_gradient.abs().max().item())


@ALL
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("silent", ["student", "teacher", "both", "one sample", "two samples"])
def test_zeros_give_finite_gradients(case, dtype, silent):
    student, teacher = (tensor.to(dtype) for tensor in case.tensors())
    if silent in ("student", "both"):
        student.zero_()
    if silent in ("teacher", "both"):
        teacher.zero_()
    if silent == "one sample":
        student[1] = 0
    if silent == "two samples":
        student[1:3] = 0
    loss, gradient = gradient_of(case, student, teacher)
    assert torch.isfinite(loss)
    assert torch.isfinite(gradient).all()
    assert gradient.abs().max() < 1e6


@ALL
def test_a_batch_of_one_is_finite(case):
    student, teacher = (tensor[:1] for tensor in case.tensors())
    loss, gradient = gradient_of(case, student, teacher, LABELS[:1])
    assert torch.isfinite(loss)
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize(
    "name", ["soft_label_loss", "soft_cross_entropy", "decoupled", "dist", "label_loss", "entropy", "standardized"]
)
def test_extreme_logits_are_finite(name):
    generator = torch.Generator().manual_seed(2)
    student = 1e4 * torch.randn(N, 7, generator=generator)
    teacher = 1e4 * torch.randn(N, 7, generator=generator)
    loss, gradient = gradient_of(CASES[name], student, teacher)
    assert torch.isfinite(loss)
    assert torch.isfinite(gradient).all()


@pytest.mark.slow
def test_every_loss_compiles_in_one_piece():
    # In a process of its own: here the losses carry checks of shapes, which are no part of them.
    here = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": f"{here}{os.pathsep}{here.parent}"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILED], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"compiled {len(CASES)}\n"
