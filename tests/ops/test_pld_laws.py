"""Laws of the native PLD, its weights, and excluded classes, NaN and infinity."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.testing import assert_close

from .pld_cases import (
    VALUE,
    assert_right,
    assert_same,
    inf,
    labels_of,
    nan,
    native,
    normal,
    run,
    spelled_out,
    truth,
)

pytestmark = native

# Laws


@pytest.mark.parametrize(("classes", "tolerance"), [(9, 0.0), (1000, 0.0), (3000, 0.0), (3000, 1e-3)])
def test_the_gradient_sums_to_zero_and_is_bounded(classes, tolerance):
    student, teacher = normal(8, classes)
    target = labels_of(teacher)
    values, gradient, _ = run(student, teacher, target, tolerance=tolerance)
    assert (values >= 0).all()
    total = gradient.double().abs().sum(-1)
    assert (gradient.double().sum(-1).abs() <= 1e-6 * total).all()
    assert (total <= 2).all()
    labelled = target >= 0
    assert (gradient[labelled].gather(-1, target[labelled, None]) <= 0).all()


@pytest.mark.parametrize("options", [{}, {"top_k": 20}, {"tolerance": 1e-3}, {"average_ties": True}], ids=str)
@pytest.mark.parametrize("classes", [33, 3000])
def test_a_constant_added_changes_nothing(classes, options):
    """To the last bit, where adding it loses none."""
    student, teacher = ((64 * x).round() / 64 for x in normal(4, classes))
    target = labels_of(teacher)
    expected = run(student, teacher, target, **options)
    for a, b in ((128.0, 0.0), (0.0, -64.0), (-32.0, 256.0)):
        for moved, still in zip(run(student + a, teacher + b, target, **options), expected, strict=True):
            assert_close(moved, still, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("options", [{}, {"top_k": 20}, {"tolerance": 1e-3}, {"average_ties": True}], ids=str)
@pytest.mark.parametrize("classes", [10, 3000])
def test_the_numbering_of_classes_does_not_matter(classes, options):
    student, teacher = normal(4, classes)
    if options == {"average_ties": True}:
        teacher = (2 * teacher).round()
    target = labels_of(teacher)
    other = torch.randperm(classes)
    moved = torch.where(target < 0, -1, other.argsort()[target.clamp(min=0)])
    values, gradient, _ = run(student, teacher, target, **options)
    again, permuted, _ = run(student[:, other], teacher[:, other], moved, **options)
    assert_close(again, values, rtol=1e-6, atol=0)
    assert_close(permuted, gradient[:, other], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("classes", [5, 1000, 2000])
@pytest.mark.parametrize("options", [{}, {"top_k": 9}, {"tolerance": 1e-2}, {"average_ties": True}], ids=str)
def test_rows_know_nothing_of_each_other(classes, options):
    student, teacher = normal(9, classes)
    student[3], teacher[4] = 200 * student[3], teacher[4].round()
    student[5, 1] = nan
    teacher[6, : classes // 2] = -inf
    teacher[7, 0] = inf
    target = labels_of(teacher[:, 1:]) + 1
    target[1] = -1
    together = run(student, teacher, target, **options)
    mixed = torch.randperm(9)
    shuffled = run(student[mixed], teacher[mixed], target[mixed], **options)
    for one, other in zip(shuffled, together, strict=True):
        assert_same(one, other[mixed])
    for row in range(9):
        alone = run(student[row, None], teacher[row, None], target[row, None], **options)
        for one, other in zip(alone, together, strict=True):
            assert_same(one, other[row, None])


def test_the_label_has_the_teachers_weight_and_no_other():
    """For a teacher certain of the label the loss is the cross-entropy."""
    student, teacher = normal(5, 1500)
    target = torch.tensor([3, 700, 1499, 0, 8])
    teacher.scatter_(1, target[:, None], 80.0)
    values, gradient, _ = run(student, teacher, target)
    student = student.double().requires_grad_()
    expected = torch.nn.functional.cross_entropy(student, target, reduction="none")
    assert_right((values, gradient), (expected.detach(), torch.autograd.grad(expected.sum(), student)[0]))


# Weights


@pytest.mark.parametrize("classes", [6, 1000, 3000])
def test_weights_multiply(classes):
    for options in ({}, {"top_k": 3}, {"tolerance": 1e-3}, {"average_ties": True}):
        student, teacher = normal(5, classes)
        weight = torch.tensor([1.0, 0.25, 0.0, 3.7, -2.0])
        values, gradient, bound = run(student, teacher, **options)
        some = run(student, teacher, weight=weight, **options)
        assert_close(some[0], weight * values, rtol=1e-6, atol=0)
        assert_close(some[1], weight[:, None] * gradient, rtol=1e-6, atol=0)
        assert_close(some[2], weight[:, None].abs() * bound, rtol=1e-6, atol=0)


@pytest.mark.parametrize("classes", [6, 3000])
def test_rows_of_weight_zero_are_not_looked_at(classes):
    student, teacher = normal(4, classes)
    student[0], teacher[1], student[2] = nan, nan, -inf
    target = torch.tensor([0, -100, classes + 9, 1])
    weight = torch.tensor([0.0, -0.0, 0.0, 1.0])
    for block in (slice(None), slice(0, 3), slice(3, 4)):
        values, gradient, bound = run(student[block], teacher[block], target[block], weight=weight[block])
        idle = weight[block] == 0
        assert (values[idle] == 0).all()
        assert (gradient[idle] == 0).all()
        assert (bound[idle] == 0).all()
        assert values[~idle].isfinite().all()


def test_a_weight_of_nan_spoils_its_row():
    student, teacher = normal(2, 6)
    values, gradient, _ = run(student, teacher, weight=torch.tensor([nan, 1.0]))
    assert values.isnan().tolist() == [True, False]
    assert gradient.isnan().all(-1).tolist() == [True, False]


# Special values

LENGTHS = [2, 7, 64, 1000, 2000]
WAYS = [{}, {"top_k": 5}, {"epsilon": 0.05}, {"tolerance": 1e-3}, {"average_ties": True}]


@pytest.mark.parametrize("options", WAYS, ids=str)
@pytest.mark.parametrize("classes", LENGTHS)
def test_nan_stays_in_its_row(classes, options):
    for network, place in itertools.product((0, 1), (0, classes // 2, classes - 1)):
        logits = normal(3, classes)
        clean = run(*logits, **options)
        logits[network][1, place] = nan
        values, gradient, _ = run(*logits, **options)
        assert values.isnan().tolist() == [False, True, False]
        assert gradient[1].isnan().all()
        assert_same(gradient[::2], clean[1][::2])


@pytest.mark.parametrize("options", WAYS, ids=str)
@pytest.mark.parametrize("classes", LENGTHS)
def test_rows_without_a_meaning(classes, options):
    """Plus infinity, a network that excludes every class, and a label that does not exist."""
    student, teacher = normal(8, classes)
    student[0, -1] = teacher[1, 0] = inf
    student[2], teacher[3] = -inf, -inf
    target = torch.tensor([-1, -1, -1, -1, classes, -2, 1, 1])
    student[6, 1] = teacher[6, 1] = -inf
    values, gradient, _ = run(student, teacher, target, **options)
    assert values.isnan().tolist() == [True] * 7 + [False]
    assert gradient.isnan().all(-1).tolist() == [True] * 7 + [False]


@pytest.mark.parametrize("options", WAYS, ids=str)
@pytest.mark.parametrize("classes", [3, 40, 1000, 2500])
def test_excluded_by_both_is_deleted(classes, options):
    student, teacher = normal(4, classes)
    gone = torch.rand(classes) < 0.4
    gone[:2] = torch.tensor([True, False])
    kept = (~gone).nonzero().flatten()
    target = kept[torch.tensor([0, -1, 0, len(kept) // 2])]
    target[2] = -1
    student[:, gone] = teacher[:, gone] = -inf
    place = torch.where(target < 0, -1, (kept == target[:, None]).long().argmax(-1))
    # Some rows are long enough for another way only while all their classes are there.
    expected = truth(student[:, kept], teacher[:, kept], place, **options)
    values, gradient, _ = run(student, teacher, target, **options)
    assert (gradient[:, gone] == 0).all()
    if "tolerance" in options:
        assert ((values - expected[0]).abs() <= 1e-3).all()
        assert ((gradient[:, kept] - expected[1]).abs().sum(-1) <= 1e-3).all()
    else:
        assert_right((values, gradient[:, kept]), expected)


@pytest.mark.parametrize("options", [{}, {"top_k": 5}, {"average_ties": True}], ids=str)
@pytest.mark.parametrize("classes", [2, 9, 1000, 2500])
def test_excluded_by_the_teacher_alone(classes, options):
    student, teacher = normal(6, classes)
    teacher[:, 1:][torch.rand(6, classes - 1) < 0.5] = -inf
    teacher[:, 0] = teacher.nan_to_num(neginf=0).amin(-1) - 0.1  # exists, and is the last that does
    target = torch.tensor([-1, 0, classes - 1, -1, classes // 2, 1])
    assert_right(run(student, teacher, target, **options), truth(student, teacher, target, **options))


@pytest.mark.parametrize("classes", [2, 9, 1000, 2500])
def test_excluded_by_the_student_alone(classes):
    """An infinite loss, but a gradient that can be followed."""
    student, teacher = normal(3, classes)
    student[0, 0] = student[1, classes - 1] = -inf
    target = torch.tensor([0, -1, -1])
    for options in ({}, {"tolerance": 1e-3}, {"average_ties": True}):
        values, gradient, _ = run(student, teacher, target, **options)
        last = 1 + (teacher[1].argmin() == classes - 1)
        assert values[0] == inf
        assert values[1] == inf or last == 2
        assert values[2].isfinite()
        assert gradient.isfinite().all()
    assert_right(run(student, teacher, target), truth(student, teacher, target))


@pytest.mark.parametrize(
    "teacher", [[0.0, 1.0, -inf, -inf], [0.0, -inf, 3.0, -inf], [-2000.0, 0.0, -2001.0, 1.0]]
)
def test_excluded_classes_of_every_sort(teacher):
    teacher = torch.tensor([teacher])
    for student in itertools.product([0.5, -inf], [0.0, -inf, 100.0], [0.0, -inf], [2.0, -inf]):
        if max(student) == -inf:
            continue
        student = torch.tensor([student])
        for label in range(-1, 4):
            target = torch.tensor([label])
            for options in ({}, {"top_k": 2}, {"average_ties": True}):
                expected = run(student, teacher, target, backend="reference", **options)
                expected = expected[0].double(), expected[1].double()
                assert_right(run(student, teacher, target, **options), expected)


@pytest.mark.parametrize("options", [{}, {"average_ties": True}, {"top_k": 3}], ids=str)
def test_excluded_by_the_student_where_the_teacher_gives_no_weight(options):
    """The weight has to vanish in the precision of the row, also in a row that needs more of it elsewhere."""
    teacher = torch.tensor([[0.0, -200.0, -1.0, -2.0]])
    for third in (-1.0, -70.0, -100.0):
        student = torch.tensor([[0.0, -inf, third, 1.0]])
        expected = run(student, teacher, backend="reference", **options)
        assert_right(run(student, teacher, **options), (expected[0].double(), expected[1].double()))


@pytest.mark.parametrize("largest", [3e38, 1e30])
def test_enormous_logits(largest):
    rows = [[largest / 4, -largest / 4, 0.0, 0.25], [0.0, 1.0, 2.0, 3.0]]
    for student, teacher in (rows, rows[::-1]):
        student, teacher = torch.tensor([student]), torch.tensor([teacher])
        value, gradient = spelled_out(student[0].tolist(), teacher[0].tolist(), -1)
        expected = torch.tensor([value], dtype=torch.float64), torch.tensor([gradient], dtype=torch.float64)
        for options in ({}, {"average_ties": True}):
            assert_right(run(student, teacher, **options), expected)
    beyond = 4 * torch.tensor(rows)  # a difference overflows
    for student, teacher in (beyond, beyond.flip(0)):
        assert run(student[None], teacher[None])[1].isfinite().all()


def test_ranges_too_small_to_divide_by():
    """2**-149 is the least number above 0."""
    for classes in (5, 1000, 3000):
        student, teacher = torch.randn(1, classes), torch.randint(3, (1, classes)) * 2.0**-149
        for options in ({}, {"tolerance": 1e-3}, {"top_k": 20}):
            expected = truth(student, teacher, **options)
            assert_right(
                run(student, teacher, **options), expected, 2e-3 if options.get("tolerance") else VALUE, 2e-3
            )


@pytest.mark.parametrize("deterministic", [False, True])
def test_every_output_is_written(deterministic):
    """PyTorch fills new memory with NaN here, so that an output that is not written shows."""
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        for classes, inner in itertools.product((1, 2, 5, 17, 100, 1023, 1500), (None, 1, 3, 21)):
            shape = (3, classes) if inner is None else (3, classes, inner)
            for dtype, apart in itertools.product((torch.float32, torch.bfloat16), (False, True)):
                student, teacher = torch.randn(2, *shape).to(dtype)
                if apart:
                    student = student.transpose(0, 1).contiguous().transpose(0, 1)
                weight = (torch.rand(shape[:1] + shape[2:]) < 0.5).float()
                for options in ({}, {"top_k": 2}, {"tolerance": 1e-3}):
                    for result in run(student, teacher, weight=weight, **options):
                        assert not result.isnan().any()
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = filled
