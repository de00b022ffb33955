"""Derivatives of the native PLD, and PyTorch's checks of an operator."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

import luce
from luce.ops.pld import PldOptions, pld

from .pld_cases import assert_same, native, normal, run

pytestmark = native

# Autograd


def arguments(classes=6, dtype=torch.float64, **changes):
    student = torch.randn(3, classes, dtype=dtype, requires_grad=True)
    given = {
        "target": torch.tensor([2, -1, 0]),
        "weight": torch.tensor([1.0, 0.5, 0.0], dtype=dtype),
        "order": None,
        "teacher_temperature": 1.5,
        "top_k": 2**62,
        "epsilon": 0.0,
        "tolerance": 0.0,
        "average_ties": False,
        "needs_gradient": True,
    }
    return (student, torch.randn(3, classes, dtype=dtype), *{**given, **changes}.values())


@pytest.mark.parametrize(
    "changes",
    [{}, {"target": None, "weight": None}, {"top_k": 2}, {"epsilon": 0.1}, {"average_ties": True}],
    ids=str,
)
def test_opcheck(changes):
    torch.library.opcheck(torch.ops.luce.pld.default, arguments(**changes))


def test_opcheck_of_other_shapes_and_dtypes():
    student = torch.randn(2, 5, 3, dtype=torch.bfloat16, requires_grad=True)
    order = torch.arange(5, dtype=torch.int32)[None, :, None].expand(2, 5, 3)
    rest = (None, None, order, 1.0, 2**62, 0.0, 0.0, False)
    for needed in (True, False):
        torch.library.opcheck(
            torch.ops.luce.pld.default, (student, torch.randn(2, 5, 3), *rest, needed),
            test_utils=("test_schema", "test_faketensor"),
        )  # fmt: skip
        view = student.detach().transpose(0, 2).contiguous().transpose(0, 2)
        torch.library.opcheck(
            torch.ops.luce.pld.default, (view, torch.randn(2, 5, 3), *rest, needed),
            test_utils=("test_schema", "test_faketensor"),
        )  # fmt: skip


@pytest.mark.parametrize(
    "options", [{}, {"top_k": 2}, {"average_ties": True}, {"teacher_temperature": 2.0}], ids=str
)
def test_derivatives(options):
    target, weight = torch.tensor([3, -1]), torch.tensor([1.3, 0.4], dtype=torch.float64)
    teacher = torch.randn(2, 5, dtype=torch.float64).round(decimals=0)
    student = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)

    def function(s):
        return pld(s, teacher, target, weight=weight, options=PldOptions(**options), backend="cpu")

    assert torch.autograd.gradcheck(function, student)
    assert torch.autograd.gradgradcheck(function, student)


def test_upstream_gradients():
    student, teacher = normal(4, 9)
    _, expected, _ = run(student, teacher)
    student.requires_grad_()
    for upstream in (torch.tensor([1.0, 2.0, 0.0, -3.5]), torch.full((4,), 0.5), torch.tensor(2.0).expand(4)):
        (gradient,) = torch.autograd.grad(pld(student, teacher, backend="cpu"), student, upstream)
        assert_close(gradient, expected * upstream[:, None])
    block = student.detach().reshape(2, 9, 2).requires_grad_()
    upstream = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    one = pld(block, teacher.reshape(2, 9, 2), backend="cpu")
    other = pld(block, teacher.reshape(2, 9, 2), backend="reference")
    assert_close(torch.autograd.grad(one, block, upstream)[0], torch.autograd.grad(other, block, upstream)[0])


def test_gradients_may_be_changed_and_backward_called_again():
    student, teacher = normal(3, 8)
    _, expected, _ = run(student, teacher)
    for factor in (1.0, 0.5):
        leaf = student.clone().requires_grad_()
        loss = factor * pld(leaf, teacher, backend="cpu").sum()
        for times in (1, 2, 3):
            loss.backward(retain_graph=True)
            assert_close(leaf.grad, times * factor * expected)
        leaf.grad.mul_(100)
        leaf.grad = None
        loss.backward(retain_graph=True)
        leaf.grad.zero_()
        leaf.grad = None
        loss.backward()
        assert_close(leaf.grad, factor * expected)


def test_the_student_may_not_change_before_the_second_derivative():
    student, teacher = normal(3, 8)
    student.requires_grad_()
    values = pld(student, teacher, backend="cpu")
    (first,) = torch.autograd.grad(values.sum(), student, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), student)
    reference = pld(student, teacher, backend="reference")
    (one,) = torch.autograd.grad(reference.sum(), student, create_graph=True)
    assert_close(first, one)
    assert_close(second, torch.autograd.grad(one.square().sum(), student)[0])


def test_without_a_gradient():
    student, teacher = normal(3, 8)
    expected, _, _ = run(student, teacher)
    assert_same(pld(student, teacher, backend="cpu"), expected)
    with torch.no_grad():
        values = pld(student.requires_grad_(), teacher, backend="cpu")
    assert not values.requires_grad
    with torch.inference_mode():
        assert_same(pld(student.detach(), teacher, backend="cpu"), expected)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled(dynamic):
    def step(student, teacher, target):
        return luce.pld_loss(student, teacher, target, backend="cpu")

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for rows, classes in ((3, 6), (5, 9)):
        student, teacher = normal(rows, classes)
        student.requires_grad_()
        target = torch.randint(classes, (rows,))
        target[0] = -100
        value = compiled(student, teacher, target)
        (gradient,) = torch.autograd.grad(value, student)
        expected = step(student, teacher, target)
        assert_close(value, expected)
        assert_close(gradient, torch.autograd.grad(expected, student)[0])
