"""Multi-level logit distillation: its three levels, and how rows count in them."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

import luce
from luce.losses.functional.multilevel import product

from . import formulas
from .catalogue import IGNORED, batch

laws = settings(max_examples=25, deadline=None, derandomize=True)
OFF = {"instance_weight": 0.0, "batch_weight": 0.0, "class_weight": 0.0}


def gram(rows):
    return [[math.fsum(a * b for a, b in zip(x, y, strict=True)) for y in rows] for x in rows]


def columns(rows):
    return [list(column) for column in zip(*rows, strict=True)]


def gap(one, other):
    """Squared Frobenius distance."""
    return math.fsum((a - b) ** 2 for x, y in zip(one, other, strict=True) for a, b in zip(x, y, strict=True))


def levels(s, t, temperature):
    """Rows, Gram matrix of rows, Gram matrix of classes, in plain Python."""
    q, p = ([formulas.softmax(row, temperature) for row in x] for x in (s, t))
    instance = math.fsum(formulas.kd(a, b, temperature) for a, b in zip(s, t, strict=True)) / len(s)
    of_classes = gap(gram(columns(p)), gram(columns(q))) / len(s[0])
    return instance, gap(gram(p), gram(q)) / len(s), of_classes


@laws
@given(st.integers(1, 5), st.integers(1, 5), st.integers(0, 1000), st.sampled_from([0.5, 1.0, 4.0]))
def test_each_level_is_its_formula(rows, classes, seed, temperature):
    student, teacher, _ = batch(rows, classes=classes, seed=seed)
    expected = levels(student.tolist(), teacher.tolist(), temperature)
    for name, value in zip(OFF, expected, strict=True):
        options = {**OFF, name: 1.0, "temperatures": [temperature]}
        assert luce.mlld_loss(student, teacher, **options).item() == pytest.approx(value, rel=1e-9, abs=1e-14)
        whole = luce.mlld_loss(student, teacher, **options, reduction="none")
        assert whole.mean().item() == pytest.approx(value, rel=1e-9, abs=1e-14)


def test_a_row_has_its_own_part_of_the_second_level_and_an_even_share_of_the_third():
    student, teacher, _ = batch(4)
    q, p = ([formulas.softmax(row) for row in x.tolist()] for x in (student, teacher))
    own = [gap([a], [b]) for a, b in zip(gram(p), gram(q), strict=True)]
    options = {**OFF, "temperatures": [1.0], "reduction": "none"}
    values = luce.mlld_loss(student, teacher, **{**options, "batch_weight": 1.0})
    assert values.tolist() == pytest.approx(own)
    values = luce.mlld_loss(student, teacher, **{**options, "class_weight": 1.0})
    assert values.tolist() == pytest.approx([levels(student.tolist(), teacher.tolist(), 1.0)[2]] * 4)


def test_rows_of_different_weight():
    """As if a row stood in the matrices by its share, the shares being one on average."""
    student, teacher, _ = batch(3)
    weight = torch.tensor([0.5, 0.0, 1.0], dtype=torch.float64)
    share = (2 / 3, 4 / 3)
    q, p = ([formulas.softmax(row) for row in x[[0, 2]].tolist()] for x in (student, teacher))

    def weighted(rows):
        return [[math.sqrt(w) * x for x in row] for w, row in zip(share, rows, strict=True)]

    options = {**OFF, "temperatures": [1.0], "row_weight": weight}
    batch_level = gap(gram(weighted(p)), gram(weighted(q))) / 2
    value = luce.mlld_loss(student, teacher, **{**options, "batch_weight": 1.0})
    assert value.item() == pytest.approx(batch_level)
    class_level = gap(gram(columns(weighted(p))), gram(columns(weighted(q)))) / 5
    value = luce.mlld_loss(student, teacher, **{**options, "class_weight": 1.0})
    assert value.item() == pytest.approx(class_level)


def test_equal_networks_cost_nothing_at_any_level():
    student, teacher, _ = batch(8)
    values = luce.mlld_loss(teacher + 3.0, teacher, reduction="none")
    assert_close(values, torch.zeros_like(values), rtol=0, atol=1e-12)
    assert (luce.mlld_loss(student, teacher, reduction="none") > 0).all()


def test_a_level_of_weight_zero_may_be_infinite():
    student, teacher, target = batch(3)
    student[0, 2] = -torch.inf
    assert luce.mlld_loss(student, teacher, target) == torch.inf
    value = luce.mlld_loss(student, teacher, target, instance_weight=0.0)
    assert value.isfinite()


def test_classes_that_exist_in_some_rows_only():
    student, teacher, target = batch(3)
    student[1, 4] = teacher[1, 4] = -torch.inf
    options = {**OFF, "temperatures": [1.0], "class_weight": 1.0}
    p, q = teacher.softmax(-1), student.softmax(-1)
    expected = (p.T @ p - q.T @ q).square().sum()
    assert_close(luce.mlld_loss(student, teacher, **options), expected / 5)
    # Where no row that counts has the class, there are four.
    student[0, 4] = teacher[0, 4] = -torch.inf
    target[2] = IGNORED
    fewer = luce.mlld_loss(student[:2, :4], teacher[:2, :4], **options)
    assert_close(luce.mlld_loss(student, teacher, target, **options), fewer)


def test_a_product_is_a_product_and_autocast_leaves_it_alone():
    a, b = torch.randn(3, 4, dtype=torch.float64), torch.randn(4, 2, dtype=torch.float64)
    assert_close(product(a, b), a @ b, rtol=0, atol=0)
    torch.autograd.gradcheck(product, (a.requires_grad_(), b.requires_grad_()))
    torch.autograd.gradgradcheck(product, (a, b))
    a, b = a.detach().float().requires_grad_(), b.detach().float().requires_grad_()
    expected = torch.autograd.grad((a @ b).square().sum(), (a, b))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (a @ b).dtype == torch.bfloat16
        assert product(a, b).dtype == torch.float32
        found = torch.autograd.grad(product(a, b).square().sum(), (a, b))
    assert_close(found, expected, rtol=0, atol=0)


def test_temperatures_from_a_recipe_are_a_list():
    student, teacher, target = batch(3)
    loss = luce.MLLDLoss(temperatures=[1.0, 4])
    assert_close(loss(student, teacher, target), luce.mlld_loss(student, teacher, temperatures=(1.0, 4.0)))
