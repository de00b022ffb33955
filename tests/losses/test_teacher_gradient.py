"""Losses that pass a gradient on to the teacher, and those that must not do so in silence."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import luce
from luce.losses import teacher_gradient
from luce.ops import rkkd
from luce.ops._pairs import sum_over_pairs

from .catalogue import CASES, IGNORED, UNLABELLED, Case, batch

taught = pytest.mark.only(
    lambda case: (
        case.loss.module.takes_teacher
        and case.loss.function not in (luce.rankdistil_loss, luce.hard_label_loss)
    )
)


def mixed(case: Case, student: Tensor, teacher: Tensor, target: Tensor, direction: Tensor) -> Tensor:
    """How the student's gradient along a direction changes with the teacher's logits."""
    student, teacher = (x.detach().clone().requires_grad_() for x in (student, teacher))
    with teacher_gradient():
        value = case(student, teacher, target).sum()
    (grad,) = torch.autograd.grad(value, student, create_graph=True)
    (found,) = torch.autograd.grad((grad * direction).sum(), teacher, allow_unused=True)
    return torch.zeros_like(teacher) if found is None else found


@taught
def test_the_mixed_derivative_against_differences_of_the_students_gradient(case: Case) -> None:
    """The gradients that are subtracted come from whatever engine the loss usually takes."""
    student, teacher, target = batch(6, seed=3)
    if case.loss.uses_label:
        target[0], target[1] = IGNORED, UNLABELLED
    if case.options.get("ties") == "average":
        teacher = teacher + torch.linspace(0, 1, 5)
    u, *directions = torch.randn(4, 6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = mixed(case, student, teacher, target, u)
    step = 1e-5
    for v in directions:
        ahead, behind = (case.grad(student, teacher + sign * step * v, target) for sign in (1, -1))
        difference = ((ahead - behind) * u).sum() / (2 * step)
        assert_close((found * v).sum(), difference, rtol=1e-6, atol=1e-8)


def excluded(x: Tensor) -> Tensor:
    return torch.cat([x[:3], x[3:].masked_fill(torch.arange(5) > 2, -torch.inf)])


@taught
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
def test_second_derivatives_are_numbers_where_the_first_are(case: Case, dtype: torch.dtype) -> None:
    """At classes without a probability too: those that a network excludes and those whose rounds to 0."""
    student, teacher, target = batch(6, seed=3, dtype=dtype)
    target %= 3
    direction = torch.randn(6, 5, generator=torch.Generator().manual_seed(1)).to(dtype)
    hard = {
        "plain": (student, teacher),
        "excluded by both": (excluded(student), excluded(teacher)),
        "excluded by the teacher": (student, excluded(teacher)),
        "a certain teacher": (student, 40 * teacher),
        "a certain student": (300 * student, teacher),
        "equal": (teacher, teacher),
        "of one value": (torch.full_like(student, 0.3), torch.full_like(teacher, 0.3)),
    }
    for name, (s, t) in hard.items():
        inputs = [x.clone().requires_grad_() for x in (s, t)]
        with teacher_gradient():
            value = case(*inputs, target).sum()
        (slope,) = torch.autograd.grad(value, inputs[0], create_graph=True)
        if value.isfinite() and slope.requires_grad:
            rate = (slope * direction.masked_fill(s.isinf(), 0)).sum()
            for found in torch.autograd.grad(rate, inputs, allow_unused=True):
                assert found is None or found.isfinite().all(), name


def test_kd_in_closed_form() -> None:
    """For KD at T the derivative is -(diag(p) - p p') u / N, and each loss has its factor T^2."""
    student, teacher, target = batch(4)
    u, temperature = torch.randn(4, 5, dtype=torch.float64), 3.0
    case = next(c for c in CASES if c.loss.name == "kd_loss")
    found = mixed(Case(case.loss, {"temperature": temperature}), student, teacher, target, u)
    p = (teacher / temperature).softmax(-1)
    assert_close(found, -(p * u - p * (p * u).sum(-1, keepdim=True)) / 4)


@taught
def test_without_the_block_the_teacher_gets_nothing_and_no_number_changes(case: Case) -> None:
    student, teacher, target = batch(6)
    teacher.requires_grad_()
    student.requires_grad_()
    with teacher_gradient():
        inside = case(student, teacher, target)
    outside = case(student, teacher, target)
    assert_close(inside, outside, rtol=1e-9, atol=1e-12)
    _, of_teacher = torch.autograd.grad(outside, (student, teacher), allow_unused=True)
    assert of_teacher is None


def test_the_block_ends_with_an_error_too() -> None:
    student, teacher, _ = batch(2)
    with pytest.raises(ZeroDivisionError), teacher_gradient():
        raise ZeroDivisionError
    assert not luce.kd_loss(student, teacher.requires_grad_()).requires_grad


def test_what_autograd_would_take_for_constant_is_refused() -> None:
    student, teacher, target = batch(2)
    for loss in (luce.RankDistilLoss(), luce.HardLabelLoss(), luce.CTKDLoss(classes=5)):
        loss.double()(student, teacher, target)
        with teacher_gradient(), pytest.raises(ValueError, match="pass a gradient on to the teacher, got"):
            loss(student, teacher, target)
    with teacher_gradient():  # one temperature for all rows does not depend on the teacher
        assert luce.CTKDLoss()(student, teacher.requires_grad_()).requires_grad


@pytest.mark.parametrize(
    "name", ["kd_loss", "reverse_kl_loss", "jsd_loss", "dkd_loss", "pld_loss", "rkkd_loss"]
)
def test_a_kernel_by_name_is_refused(name: str) -> None:
    student, teacher, target = batch(2)
    loss = getattr(luce, name)
    with teacher_gradient(), pytest.raises(RuntimeError, match="no gradient for the teacher"):
        loss(student, teacher.requires_grad_(), target, backend="cpu")


def test_pairs_in_blocks_pass_it_on() -> None:
    """Of classes so many that not all pairs fit into memory at a time."""
    student, teacher, _ = batch(3)

    def part(s: Tensor, t: Tensor, first: int, count: int) -> Tensor:
        return rkkd.reference.total_agreement(s, t, "tanh", 1.0, first, count)

    def total(s: Tensor, t: Tensor, width: int) -> Tensor:
        return sum_over_pairs(part, s, t, width)

    inputs = (student.requires_grad_(), teacher.requires_grad_())
    assert torch.autograd.gradcheck(lambda s, t: total(s, t, 2), inputs)
    assert torch.autograd.gradgradcheck(lambda s, t: total(s, t, 2), inputs)
    at_once, in_blocks = (torch.autograd.grad(total(*inputs, width).sum(), inputs) for width in (5, 2))
    assert_close(in_blocks, at_once)
