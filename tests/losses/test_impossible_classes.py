"""A class at -inf in both networks does not exist; in one of them, each loss says what it does."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch.testing import assert_close

import luce

from .catalogue import UNLABELLED, batch

inf, nan = math.inf, math.nan


def with_impossible(x: torch.Tensor, places: list[int], total: int) -> torch.Tensor:
    """`x` spread over `total` classes in their order, -inf in all others."""
    wide = x.new_full((*x.shape[:-1], total), -inf)
    wide[..., places] = x
    return wide


PLACES = {
    "one behind": ([0, 1, 2, 3, 4], 6),
    "many behind": ([0, 1, 2, 3, 4], 60),
    "in front": ([2, 3, 4, 5, 6], 7),
    "between": ([1, 3, 4, 7, 8], 9),
}


def test_impossible_classes_change_nothing(case):
    for dtype, (places, total) in itertools.product((torch.float64, torch.float32), PLACES.values()):
        student, teacher, target = batch(4, dtype=dtype)
        wide = [with_impossible(x, places, total) for x in (student, teacher)]
        labels = torch.tensor(places)[target]
        # A longer sum adds up in another order.
        close = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-10, "atol": 1e-12}
        values = case(student, teacher, target, reduction="none")
        assert_close(case(*wide, labels, reduction="none"), values, **close)
        gradient = case.grad(*wide, labels)
        assert_close(gradient[:, places], case.grad(student, teacher, target), **close)
        gradient[:, places] = 0
        assert (gradient == 0).all()


@pytest.mark.only(lambda case: not case.loss.needs_label)
def test_impossible_classes_change_nothing_without_a_label(case):
    student, teacher, target = batch(4)
    wide = [with_impossible(x, [1, 3, 4, 7, 8], 9) for x in (student, teacher)]
    expected = case(student, teacher, reduction="none")
    assert_close(case(*wide, reduction="none"), expected)
    unlabelled = torch.full_like(target, UNLABELLED)
    assert_close(case(*wide, unlabelled, reduction="none"), expected)


def test_each_row_has_its_own_classes(by_row):
    student, teacher, target = batch(3)
    lists = [[0, 2, 3, 4, 5], [1, 2, 3, 4, 6], [0, 1, 2, 5, 6]]
    wide = [
        torch.stack([with_impossible(row, p, 7) for row, p in zip(x, lists, strict=True)])
        for x in (student, teacher)
    ]
    labels = torch.stack([torch.tensor(p)[y] for p, y in zip(lists, target, strict=True)])
    expected = by_row(student, teacher, target, reduction="none")
    assert_close(by_row(*wide, labels, reduction="none"), expected)


def test_only_the_label_is_left(case):
    student, teacher, _ = batch(3)
    keep = torch.arange(5) == 2
    student, teacher = student.masked_fill(~keep, -inf), teacher.masked_fill(~keep, -inf)
    target = torch.full((3,), 2)
    expected = case(student[:, 2:3], teacher[:, 2:3], target * 0, reduction="none")
    assert_close(case(student, teacher, target, reduction="none"), expected)
    assert case.grad(student, teacher, target).isfinite().all()


def test_a_class_that_only_the_student_excludes(case):
    student, teacher, target = batch(3)
    target[:] = 1
    student[0, 1] = -inf
    values = case(student, teacher, target, reduction="none")
    if case.loss.inf_if_student_excludes or case.limit:
        assert values[0] == inf
    else:
        assert values.isfinite().all()
        gradient = case.grad(student, teacher, target)
        assert gradient.isfinite().all()
        assert gradient[0, 1] == 0
    if not case.loss.couples_rows:  # what happens in a row stays there
        assert_close(values[1:], case(student[1:], teacher[1:], target[1:], reduction="none"))
        gradient = case.grad(student, teacher, target, reduction="none")[1:]
        assert_close(gradient, case.grad(student[1:], teacher[1:], target[1:], reduction="none"))


def test_a_class_that_only_the_teacher_excludes(case):
    student, teacher, target = batch(3)
    target[:] = 1
    teacher[0, 3] = -inf
    values = case(student, teacher, target, reduction="none")
    if case.loss.inf_if_teacher_excludes or case.limit:
        assert values[0] == inf
    else:
        assert values.isfinite().all()
        assert case.grad(student, teacher, target).isfinite().all()
    if not case.loss.couples_rows:
        assert_close(values[1:], case(student[1:], teacher[1:], target[1:], reduction="none"))
        gradient = case.grad(student, teacher, target, reduction="none")[1:]
        assert_close(gradient, case.grad(student[1:], teacher[1:], target[1:], reduction="none"))


def test_an_impossible_class_before_one_that_only_the_teacher_excludes(case):
    """Both stand last in the teacher's order, the impossible one first."""
    student, teacher, target = batch(3)
    target[:] = 1
    teacher[:, 3] = -inf
    wide = [with_impossible(x, [0, 1, 2, 4, 5], 6) for x in (student, teacher)]
    expected = case(student, teacher, target, reduction="none")
    assert_close(case(*wide, target, reduction="none"), expected)


def test_a_class_that_the_teacher_excludes_ranks_last_in_pld():
    student, teacher, target = batch(3)
    target[:] = 1
    lowest = teacher.clone()
    teacher[:, 3], lowest[:, 3] = -inf, -60.0
    assert_close(luce.pld_loss(student, teacher, target), luce.pld_loss(student, lowest, target))


def test_jsd_of_networks_that_share_no_class_is_log_two():
    student = torch.tensor([[0.0, -inf, 0.3]])
    teacher = torch.tensor([[-inf, 2.0, -inf]])
    assert_close(luce.jsd_loss(student, teacher).item(), math.log(2), rtol=1e-6, atol=0)


def test_a_weight_of_zero_switches_a_term_of_dkd_off():
    student, teacher, target = batch(3)
    expected = luce.dkd_loss(student[:, :4], teacher[:, :4], target.clamp(max=3), alpha=1.0, beta=0.0)
    assert expected.isfinite()
    student[:, 4], target = -inf, target.clamp(max=3)
    assert luce.dkd_loss(student, teacher, target, beta=0.0).isfinite()


# NaN


def test_nan_stays_in_its_row_and_is_never_hidden(case):
    student, teacher, target = batch(3)
    networks = ("student", "teacher") if case.loss.module.takes_teacher else ("student",)
    for network, place in itertools.product(networks, range(5)):
        spoilt = {"student": student.clone(), "teacher": teacher.clone()}
        spoilt[network][1, place] = nan
        values = case(spoilt["student"], spoilt["teacher"], target, reduction="none")
        assert values[1].isnan()
        assert case(spoilt["student"], spoilt["teacher"], target).isnan()
        if not case.loss.couples_rows:
            assert_close(values[[0, 2]], case(student, teacher, target, reduction="none")[[0, 2]])
            gradient = case.grad(spoilt["student"], spoilt["teacher"], target)
            assert_close(gradient[[0, 2]], case.grad(student, teacher, target)[[0, 2]])
