"""The parts of Plackett-Luce Distillation: the ranking, and what it costs."""

from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

from luce.ops.pld import PldOptions, label_first, pld, ranking_nll, teacher_order

inf = math.inf


def tensor(x):
    return torch.tensor(x, dtype=torch.float64)


# Order


def test_the_teacher_ranks_ties_by_class_index():
    teacher = tensor([[1.0, 3.0, 1.0, 3.0, 2.0], [0.0] * 5, [-inf, 1.0, -inf, 1.0, -inf]])
    assert teacher_order(teacher).tolist() == [[1, 3, 4, 0, 2], [0, 1, 2, 3, 4], [1, 3, 0, 2, 4]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("classes", [5, 17, 1000, 5000])
def test_many_ties_in_any_dtype(dtype, classes):
    """Past sixteen elements an unstable sort shows."""
    teacher = torch.randint(3, (4, classes)).to(dtype)
    expected = [sorted(range(classes), key=lambda i, row=row: (-row[i], i)) for row in teacher.tolist()]
    assert teacher_order(teacher).tolist() == expected


def test_zeros_of_both_signs_are_tied():
    assert teacher_order(tensor([[-0.0, 0.0, -0.0]])).tolist() == [[0, 1, 2]]


def test_label_first():
    order = torch.tensor([[3, 1, 0, 2]]).expand(6, -1)
    target = torch.tensor([3, 1, 0, 2, -1, -100])
    expected = [[3, 1, 0, 2], [1, 3, 0, 2], [0, 3, 1, 2], [2, 3, 1, 0], [3, 1, 0, 2], [3, 1, 0, 2]]
    assert label_first(order, target).tolist() == expected


def test_label_first_of_one_class_and_of_no_rows():
    assert label_first(torch.zeros(2, 1, dtype=torch.long), torch.tensor([0, -1])).tolist() == [[0], [0]]
    assert label_first(torch.zeros(0, 3, dtype=torch.long), torch.zeros(0, dtype=torch.long)).shape == (0, 3)


# Cost


def test_the_cost_of_a_ranking_spelled_out():
    u, alpha = tensor([[1.0, 0.0, 2.0]]), tensor([[0.2, 0.5, 0.3]])
    first = math.log((math.e + 1 + math.exp(2)) / math.e)
    second = math.log(1 + math.exp(2))
    assert ranking_nll(u, alpha).item() == pytest.approx(0.2 * first + 0.5 * second, rel=1e-14)
    assert ranking_nll(u, alpha, top_k=1).item() == pytest.approx(0.2 * first, rel=1e-14)
    for top_k in (2, 3, 50):
        assert_close(ranking_nll(u, alpha, top_k=top_k), ranking_nll(u, alpha))


def test_one_value_per_row():
    u, alpha = torch.randn(5, 4), torch.rand(5, 4)
    values = ranking_nll(u, alpha)
    assert values.shape == (5,)
    for row in range(5):
        assert_close(values[row : row + 1], ranking_nll(u[row : row + 1], alpha[row : row + 1]))
    assert ranking_nll(u[:0], alpha[:0]).shape == (0,)
    assert (ranking_nll(u[:, :1], alpha[:, :1]) == 0).all()


def test_truncation_drops_terms_and_no_classes():
    u = torch.randn(3, 8, dtype=torch.float64)
    alpha = torch.rand(3, 8, dtype=torch.float64)
    for k in range(1, 9):
        kept = torch.where(torch.arange(8) < k, alpha, 0)
        assert_close(ranking_nll(u, alpha, top_k=k), ranking_nll(u, kept))
        tail = torch.cat([u[:, :k], u[:, k:].flip(-1)], -1)  # the tail has no order
        assert_close(ranking_nll(tail, alpha, top_k=k), ranking_nll(u, alpha, top_k=k))


def test_a_class_that_outweighs_all_that_follow_keeps_its_digits():
    """-log(w / (w + z)) is z / w to first order, far below the epsilon of a difference of logits."""
    u = torch.tensor([[60.0, 0.0]])
    value = ranking_nll(u, torch.ones(1, 2)).item()
    assert value == pytest.approx(math.exp(-60), rel=1e-5)
    assert ranking_nll(torch.tensor([[0.0, 60.0]]), torch.ones(1, 2)).item() == pytest.approx(60.0)


def test_large_weights_have_a_gradient():
    """The chain rule multiplies them by exp of a difference of logits: in the wrong order that overflows."""
    u = torch.tensor([[0.0, 39.0, 5.0]], requires_grad=True)
    alpha = torch.tensor([[1e30, 1e10, 0.0]])
    (gradient,) = torch.autograd.grad(ranking_nll(u, alpha).sum(), u)
    assert_close(gradient, torch.tensor([[-1e30, 1e30, 1e30 * math.exp(5 - 39)]]), rtol=1e-4, atol=0)


def test_excluded_classes():
    one = tensor([[0.5, 0.25, 0.25]])
    assert ranking_nll(tensor([[1.0, -inf, 2.0]]), one) == inf
    assert_close(
        ranking_nll(tensor([[1.0, -inf, 2.0]]), tensor([[0.5, 0.0, 0.5]])), 0.5 * tensor([math.log1p(math.e)])
    )
    assert ranking_nll(tensor([[1.0, -inf, -inf]]), tensor([[1.0, 0.0, 0.0]])) == 0
    assert ranking_nll(tensor([[-inf, -inf]]), tensor([[0.0, 0.0]])) == 0
    u = tensor([[1.0, -inf, 2.0, -inf]]).requires_grad_()
    (gradient,) = torch.autograd.grad(ranking_nll(u, tensor([[0.6, 0.0, 0.4, 0.0]])).sum(), u)
    share = 1 / (1 + math.exp(-1.0))
    assert_close(gradient, tensor([[-0.6 * share, 0.0, 0.6 * share, 0.0]]))


def test_nan_is_not_hidden():
    for place in range(3):
        u = torch.zeros(1, 3)
        u[0, place] = math.nan
        assert ranking_nll(u, torch.ones(1, 3)).isnan()
    assert ranking_nll(torch.zeros(1, 3), torch.tensor([[1.0, math.nan, 1.0]])).isnan()


def test_gradcheck():
    u = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    alpha = torch.rand(3, 5, dtype=torch.float64, requires_grad=True)
    for top_k in (None, 1, 3):
        assert torch.autograd.gradcheck(lambda u, a, k=top_k: ranking_nll(u, a, k), (u, alpha))


# Together


def test_pld_takes_a_known_order():
    student, teacher = torch.randn(2, 4, 6, dtype=torch.float64)
    target = torch.tensor([0, 5, -1, 3])
    expected = pld(student, teacher, target)
    assert_close(pld(student, teacher, target, order=teacher_order(teacher)), expected, rtol=0, atol=0)
    other = pld(student, teacher, target, order=teacher_order(-teacher))
    assert (other != expected).all()


def test_the_temperature_softens_the_weights_and_nothing_else():
    student, teacher = torch.randn(2, 4, 6, dtype=torch.float64)
    target = torch.tensor([0, 5, -1, 3])
    order = label_first(teacher_order(teacher), target)
    expected = ranking_nll(student.gather(-1, order), (teacher / 3).softmax(-1).gather(-1, order))
    assert_close(pld(student, teacher, target, options=PldOptions(teacher_temperature=3.0)), expected)
