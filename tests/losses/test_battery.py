"""What every loss does with shapes, dtypes, reductions, masks and weights."""

from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

import luce

from .catalogue import IGNORED, UNLABELLED, batch

inf, nan = math.inf, math.nan


# Shapes


def test_a_single_row(case):
    student, teacher, target = batch(1)
    value = case(student[0], teacher[0], target[0], reduction="none")
    assert value.shape == ()
    assert_close(value, case(student, teacher, target))


def test_the_class_dimension_may_stand_anywhere(case):
    for rows, class_dim in (((2, 3, 2), 1), ((2, 3, 2), 0), ((2, 3), -1), ((2, 3), 1), ((4,), -1)):
        student, teacher, target = batch(*rows)
        expected = case(student.flatten(0, -2), teacher.flatten(0, -2), target.flatten(), reduction="none")
        student, teacher = student.movedim(-1, class_dim), teacher.movedim(-1, class_dim)
        values = case(student, teacher, target, class_dim=class_dim, reduction="none")
        assert values.shape == rows
        assert_close(values.flatten(), expected)
        assert_close(case(student, teacher, target, class_dim=class_dim), expected.mean())


def test_an_empty_batch(case):
    student, teacher, target = batch(0)
    student.requires_grad_()
    assert case(student, teacher, target, reduction="none").shape == (0,)
    for reduction in ("mean", "sum"):
        value = case(student, teacher, target, reduction=reduction)
        assert value.item() == 0
        assert torch.autograd.grad(value, student)[0].shape == (0, 5)


def test_one_class_leaves_nothing_to_choose(case):
    student, teacher, target = batch(3, classes=1)
    values = case(student, teacher, target, reduction="none")
    assert values.isfinite().all()
    if case.shift_invariant:
        assert_close(case.grad(student, teacher, target), torch.zeros_like(student))
        if not case.loss.couples_rows:
            assert_close(values, torch.zeros_like(values))


def test_two_classes(case):
    student, teacher, target = batch(6, classes=2)
    assert case(student, teacher, target).isfinite()
    gradient = case.grad(student, teacher, target)
    assert gradient.isfinite().all()
    if case.shift_invariant:  # with two classes a row has one degree of freedom
        assert_close(gradient[:, 0], -gradient[:, 1])


def test_strided_expanded_and_channels_last_inputs(case):
    student, teacher, target = batch(2, 3, 4)
    student, teacher = student.movedim(-1, 1).contiguous(), teacher.movedim(-1, 1).contiguous()
    expected, gradient = case(student, teacher, target), case.grad(student, teacher, target)

    def channels_last(x):
        return x.to(memory_format=torch.channels_last)

    def every_other(x):
        return torch.stack([x, torch.full_like(x, nan)], dim=-1)[..., 0]

    def transposed(x):
        return x.transpose(1, 3).contiguous().transpose(1, 3)

    for layout in (channels_last, every_other, transposed):
        strided = layout(student).detach().requires_grad_()
        assert not strided.is_contiguous(), layout
        labels = torch.stack([target, target * 0 + 77], dim=-1)[..., 0]
        value = case(strided, layout(teacher), labels)
        assert_close(value, expected)
        assert_close(torch.autograd.grad(value, strided)[0], gradient)


def test_an_expanded_row_gets_the_sum_of_its_gradients(case):
    student, teacher, target = batch(3)
    row = student[:1].clone().requires_grad_()
    value = case(row.expand(3, -1), teacher, target)
    whole = student[:1].repeat(3, 1)
    assert_close(value, case(whole, teacher, target))
    assert_close(torch.autograd.grad(value, row)[0], case.grad(whole, teacher, target).sum(0, keepdim=True))


def test_inputs_are_left_alone(case):
    student, teacher, target = batch(4)
    target[0], target[1] = IGNORED, UNLABELLED
    student[0], weight = nan, torch.tensor([1.0, 2.0, 0.0, 0.5])
    before = [x.clone() for x in (student, teacher, target, weight)]
    case(student.requires_grad_(), teacher, target, row_weight=weight).backward()
    for now, then in zip((student, teacher, target, weight), before, strict=True):
        assert_close(now.detach(), then, rtol=0, atol=0, equal_nan=True)


# Dtypes


def test_dtypes_agree_with_float64_on_the_same_numbers(case):
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        student, teacher, target = batch(6, 7, dtype=dtype)
        student, teacher, target = student.flatten(0, 1), teacher.flatten(0, 1), target.flatten()
        expected = case(student.double(), teacher.double(), target, reduction="none")
        values = case(student, teacher, target, reduction="none")
        assert values.dtype == torch.promote_types(dtype, torch.float32)
        tolerance = 1e-12 if dtype == torch.float64 else 1e-5
        assert_close(values.double(), expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))

        gradient = case.grad(student, teacher, target)
        assert gradient.dtype == dtype
        expected = case.grad(student.double(), teacher.double(), target)
        info = torch.finfo(dtype)
        subnormal = info.tiny * info.eps  # float16 has no numbers between its multiples of 6e-8
        atol = 1e-5 * float(expected.abs().max()) + subnormal
        assert_close(gradient.double(), expected, rtol=max(tolerance, info.eps), atol=atol)


WIDER = (
    (torch.float32, torch.float64, torch.float64),
    (torch.float64, torch.float16, torch.float64),
    (torch.bfloat16, torch.float16, torch.float32),
    (torch.float32, torch.bfloat16, torch.float32),
)


def test_the_wider_dtype_of_the_two_networks_counts(case):
    for student_dtype, teacher_dtype, expected in WIDER:
        student, teacher, target = batch(3)
        student, teacher = student.to(student_dtype), teacher.to(teacher_dtype)
        value = case(student, teacher, target)
        if case.loss.module.takes_teacher:
            assert value.dtype == expected
            assert_close(value, case(student.to(expected), teacher.to(expected), target))
        assert case.grad(student, teacher, target).dtype == student_dtype


# Reductions


def test_reductions(case):
    student, teacher, target = batch(4)
    values = case(student, teacher, target, reduction="none")
    assert values.shape == (4,)
    assert_close(case(student, teacher, target, reduction="sum"), values.sum())
    assert_close(case(student, teacher, target), values.sum() / 4)


def test_weighted_reductions(case):
    student, teacher, target = batch(4)
    weight = torch.tensor([0.5, 0.0, 2.0, 1.0], dtype=torch.float64)
    values = case(student, teacher, target, row_weight=weight, reduction="none")
    if not case.loss.couples_rows:
        assert_close(values, weight * case(student, teacher, target, reduction="none"))
    assert_close(case(student, teacher, target, row_weight=weight, reduction="sum"), values.sum())
    assert_close(case(student, teacher, target, row_weight=weight), values.sum() / 3.5)


def test_micro_batches_weighted_by_their_rows_are_one_batch(by_row):
    student, teacher, target = batch(7)
    target[2] = IGNORED
    whole = by_row(student, teacher, target), by_row.grad(student, teacher, target)
    parts = (slice(0, 3), 2), (slice(3, 7), 4)  # with the number of rows kept
    value = sum(n / 6 * by_row(student[i], teacher[i], target[i]) for i, n in parts)
    gradient = torch.cat([n / 6 * by_row.grad(student[i], teacher[i], target[i]) for i, n in parts])
    assert_close(value, whole[0])
    assert_close(gradient, whole[1])


# Rows that do not count


def test_ignoring_is_deleting(case):
    for ignore_index in (IGNORED, 255, 3, UNLABELLED):
        student, teacher, target = batch(6)
        target = target.where(target != ignore_index, 0)
        keep = torch.tensor([True, False, True, True, False, True])
        masked = target.where(keep, ignore_index)
        for reduction in ("mean", "sum"):
            options = {"reduction": reduction, "ignore_index": ignore_index}
            value = case(student, teacher, masked, **options)
            assert_close(value, case(student[keep], teacher[keep], target[keep], reduction=reduction))
            gradient = case.grad(student, teacher, masked, **options)
            assert_close(
                gradient[keep], case.grad(student[keep], teacher[keep], target[keep], reduction=reduction)
            )
            assert (gradient[~keep] == 0).all()
        values = case(student, teacher, masked, ignore_index=ignore_index, reduction="none")
        assert_close(values[keep], case(student[keep], teacher[keep], target[keep], reduction="none"))
        assert (values[~keep] == 0).all()


def test_what_stands_in_an_ignored_row_does_not_matter(case):
    for junk in (nan, inf, -inf, 1e38):
        student, teacher, target = batch(4, dtype=torch.float32)
        target[1] = IGNORED
        clean, gradient = case(student, teacher, target), case.grad(student, teacher, target)
        student[1], teacher[1] = junk, junk
        assert_close(case(student, teacher, target), clean)
        assert_close(case.grad(student, teacher, target), gradient)
        assert case(student, teacher, target, reduction="none")[1] == 0


def test_no_row_at_all_gives_zero_and_zero_gradient(case):
    for mark in ("ignore_index", "row_weight"):
        student, teacher, target = batch(3)
        student[0] = nan
        options = {"row_weight": torch.zeros(3)} if mark == "row_weight" else {}
        target = target if mark == "row_weight" else torch.full_like(target, IGNORED)
        for reduction in ("mean", "sum", "none"):
            assert (case(student, teacher, target, reduction=reduction, **options) == 0).all()
            assert (case.grad(student, teacher, target, reduction=reduction, **options) == 0).all()


def test_weight_zero_is_deleting(case):
    student, teacher, target = batch(4)
    keep = torch.tensor([True, False, True, True])
    weight = keep.double()
    expected = case(student[keep], teacher[keep], target[keep])
    gradient = case.grad(student[keep], teacher[keep], target[keep])
    student[1], teacher[1] = nan, -inf
    for row_weight in (weight, weight.float(), weight.int(), keep):
        assert_close(case(student, teacher, target, row_weight=row_weight), expected)
        assert_close(case.grad(student, teacher, target, row_weight=row_weight)[keep], gradient)


def test_the_label_of_a_row_of_weight_zero_does_not_matter(case):
    student, teacher, target = batch(3)
    weight = torch.tensor([1.0, 0.0, 1.0])
    expected = case(student, teacher, target, row_weight=weight)
    target[1] = 99
    assert_close(case(student, teacher, target, row_weight=weight), expected)


# A sum over rows cannot tell a unit of weights from a number of rows; where the unit is free, this is not.
@pytest.mark.only(lambda case: not case.loss.grows_with_rows)
def test_weight_two_is_standing_there_twice(case):
    student, teacher, target = batch(4)
    twice = torch.tensor([0, 1, 1, 2, 3])
    weight = torch.tensor([1, 2, 1, 1])
    for reduction in ("mean", "sum"):
        value = case(student, teacher, target, row_weight=weight, reduction=reduction)
        assert_close(value, case(student[twice], teacher[twice], target[twice], reduction=reduction))


def test_the_mean_does_not_depend_on_the_unit_of_the_weights(case):
    for factor in (1e6, 1e-6):
        student, teacher, target = batch(4)
        weight = torch.tensor([0.5, 1.0, 2.0, 0.25], dtype=torch.float64)
        expected = case(student, teacher, target, row_weight=weight)
        value = case(student, teacher, target, row_weight=factor * weight)
        assert_close(value, expected)


# Rows without a label


def test_unlabelled_rows(case):
    student, teacher, target = batch(5)
    bare = torch.tensor([False, True, False, False, True])
    mixed = target.where(~bare, UNLABELLED)
    values = case(student, teacher, mixed, reduction="none")
    if case.loss.needs_label:  # such a row cannot count
        assert (values[bare] == 0).all()
        assert_close(case(student, teacher, mixed), case(student[~bare], teacher[~bare], target[~bare]))
    else:
        assert_close(values[bare], case(student, teacher, reduction="none")[bare])
        assert_close(case(student, teacher, mixed), values.mean())
    assert_close(values[~bare], case(student, teacher, target, reduction="none")[~bare])


def looks_at_the_label(case):
    """Not at which it is if that is among the largest that are kept, or if KD's three parts weigh alike."""
    in_parts = case.loss.function is luce.decomposed_kd_loss and "guidance_weight" not in case.options
    return case.options.get("keep") != "topk" and not in_parts


@pytest.mark.only.with_args(looks_at_the_label)
def test_labels_matter_where_they_should(case):
    student, teacher, target = batch(5)
    values = case(student, teacher, target, reduction="none")
    others = case(student, teacher, (target + 1) % 5, reduction="none")
    assert bool((values != others).all()) is case.loss.uses_label


@pytest.mark.only(lambda case: case.loss.uses_label)
def test_the_mark_of_unlabelled_rows_can_be_chosen(case):
    student, teacher, target = batch(4)
    target[1] = UNLABELLED
    expected = case(student, teacher, target)
    assert_close(case(student, teacher, target.where(target >= 0, -5), unlabelled_index=-5), expected)
    with pytest.raises(ValueError, match=r"expected labels in \[0, 5\).*got -1"):
        case(student, teacher, target, unlabelled_index=-5)


@pytest.mark.only(lambda case: case.loss.needs_label)
def test_a_loss_that_needs_labels_refuses_to_go_without(case):
    student, teacher, _ = batch(4)
    with pytest.raises(TypeError, match="target"):
        case(student, teacher, None)


# Gradients


def test_only_the_student_gets_a_gradient(case):
    student, teacher, target = batch(4)
    teacher.requires_grad_()
    case(student.requires_grad_(), teacher, target).backward()
    assert teacher.grad is None
    assert student.grad.abs().sum() > 0


def test_a_student_that_is_its_own_teacher(case):
    student, _, target = batch(4)
    itself = student.clone().requires_grad_()
    case(itself, itself, target).backward()
    assert_close(itself.grad, case.grad(student, student.clone(), target))


@pytest.mark.only(lambda case: not case.loss.detached)
def test_gradcheck(case):
    student, teacher, target = batch(5, classes=4)
    target[1], target[2] = UNLABELLED, IGNORED
    weight = torch.tensor([1.0, 2.0, 1.0, 0.0, 0.5], dtype=torch.float64)
    for reduction in ("mean", "none"):
        torch.autograd.gradcheck(
            lambda s, r=reduction: case(s, teacher, target, row_weight=weight, reduction=r),
            student.requires_grad_(),
        )


@pytest.mark.only(lambda case: not case.loss.detached)
def test_gradgradcheck(case):
    student, teacher, target = batch(3, classes=4)
    torch.autograd.gradgradcheck(lambda s: case(s, teacher, target), student.requires_grad_())


def test_the_weights_of_rows_can_be_learned(case):
    student, teacher, target = batch(4)
    weight = torch.tensor([1.0, 2.0, 0.5, 3.0], dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda w: case(student, teacher, target, row_weight=w), weight)


# Autocast


def test_autocast_changes_nothing(case):
    student, teacher, target = batch(8, dtype=torch.bfloat16)
    for dtype in (torch.bfloat16, torch.float32):
        expected = case(student.to(dtype), teacher.to(dtype), target)
        gradient = case.grad(student.to(dtype), teacher.to(dtype), target)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            value = case(student.to(dtype), teacher.to(dtype), target)
            assert value.dtype == torch.float32
            assert_close(value, expected, rtol=1e-6, atol=0)
            assert_close(case.grad(student.to(dtype), teacher.to(dtype), target), gradient)
