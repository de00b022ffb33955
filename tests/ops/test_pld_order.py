"""The order of the native PLD, exact to the last bit, and the error bound of unsorted classes."""

from __future__ import annotations

import pytest
import torch

import luce
from luce.ops.pld import teacher_order

from .pld_cases import (
    KINDS,
    VALUE,
    assert_bounded,
    assert_right,
    assert_same,
    inf,
    labels_of,
    language,
    nan,
    native,
    normal,
    run,
    truth,
)

pytestmark = native

# The order


def sequences(classes):
    """Teachers that are hard to sort: (name, logits)."""
    steps = torch.randperm(classes).float()
    yield "random", torch.randn(classes)
    yield "rising", torch.arange(classes) * (80 / classes)
    yield "falling", torch.arange(classes) * (-80 / classes)
    yield "three values", torch.randint(3, (classes,)).float()
    yield "one value", torch.full((classes,), 0.7)
    yield "bfloat16", torch.randn(classes).bfloat16().float()
    yield "zeros of both signs", torch.zeros(classes) * torch.randn(classes).sign()
    neighbours = 1 + steps * 2**-23
    yield "neighbours", neighbours
    outlier = neighbours.clone()
    outlier[classes // 3] = 40.0
    yield "neighbours and an outlier", outlier
    yield "clusters", torch.randint(5, (classes,)) * 10 + torch.randn(classes) * 1e-4
    nested = torch.where(torch.rand(classes) < 0.9, steps * 2**-23, torch.rand(classes))
    nested[0] = 30.0
    yield "clusters in clusters", nested
    ties = torch.where(
        torch.rand(classes) < 0.95, torch.randint(2, (classes,)) * 2.0**-20, torch.rand(classes)
    )
    ties[classes // 2] = 50.0
    yield "crowds of equals", ties


@pytest.mark.parametrize("classes", [2, 31, 33, 500, 1024, 1025, 3000, 20000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_order_is_exact(classes, dtype):
    """To the last bit: the same sums in another order of the classes would differ."""
    for name, teacher in sequences(classes):
        student, teacher = torch.randn(1, classes).to(dtype), teacher[None].to(dtype)
        known = teacher_order(teacher)
        for target in (None, known[:, -1:].flatten(), known[:, classes // 2]):
            own, given = run(student, teacher, target), run(student, teacher, target, order=known)
            assert torch.equal(own[0], given[0]), name
            assert torch.equal(own[1], given[1]), name


@pytest.mark.parametrize("classes", [7, 100, 1500])
@pytest.mark.parametrize("index", [torch.int64, torch.int32])
def test_a_given_order(classes, index):
    student, teacher = normal(6, classes)
    order = torch.stack([torch.randperm(classes) for _ in range(6)])
    target = torch.tensor([-1, 0, classes - 1, -1, 3, 2])
    target[4], target[5] = order[4, 0], order[5, -1]
    for options in ({}, {"top_k": 5}, {"average_ties": True}):
        expected = truth(student, teacher, target, order=order, **options)
        assert_right(run(student, teacher, target, order=order.to(index), **options), expected)
        strided = order.to(index).t().contiguous().t()
        assert_right(run(student, teacher, target, order=strided, **options), expected)


# The certificate


def adversaries(n):
    """Rows that would tempt a careless certificate: (name, student, teacher, label)."""
    student, teacher, some = torch.randn(n), torch.randn(n), n // 3
    yield "normal", student, teacher, some
    yield "all in one bin", student, 1e-6 * teacher, some
    yield "all tied", student, torch.zeros(n), some
    yield "bfloat16", student.bfloat16().float(), teacher.bfloat16().float(), -1
    outlier = 1e-3 * teacher
    outlier[some] = 60.0
    yield "an outlier above", student, outlier, -1
    yield "an outlier above and elsewhere the label", student, outlier, 5
    yield "two clusters", student, torch.where(teacher > 0, 0.0, -20.0) + 1e-3 * teacher, -1
    crowd = torch.full((n,), -40.0)
    crowd[:50] = torch.linspace(4, -4, 50)
    equals = torch.full((n,), -0.3)
    equals[7] = 0.0
    yield "a crowd of equals behind", equals, crowd, -1
    yield "a crowd of unequals behind", student, crowd + 1e-3 * teacher, -1
    yield "the label in the crowd", student, crowd, n - 7
    giant = student.clone()
    giant[n - 9] = 15.0
    yield "a giant in the crowd", giant, crowd, -1
    yield "a giant in the crowd, labelled", giant, crowd, n - 9
    near = crowd.clamp(min=-5)  # the crowd has weight
    yield "a giant in a crowd with weight", giant, near, 0
    peak = near.clone()
    peak[50:] += 1e-4 * teacher[50:]
    yield "a loose crowd with weight", giant, peak, -1
    for gap in (30.0, 58.0, 550.0):  # in float64, squares of e**-550 are 0
        far = student.clone()
        far[some] = gap
        yield f"the label {gap} above", far, crowd.clamp(min=-5), some
        yield f"a class without weight {gap} above", far, torch.where(far == gap, -1500.0, 0.1 * teacher), -1
    for spread in (50, 120, 200):
        yield f"student of spread {spread}", spread * student, teacher, some
        yield f"student of spread {spread}, crowd", spread * student, crowd, -1
    yield "teacher of range 1e4", student, 1e4 * teacher, some
    yield "teacher of range 100", student, 20 * teacher, -1
    yield "language", *(x[0] for x in language(1, n)), 11
    head = torch.full((n,), -inf)
    head[10:30] = torch.linspace(0, 3, 20)
    both = torch.where(head == -inf, -inf, student)
    yield "only twenty classes exist", both, head, 12
    yield "the teacher excludes all but twenty", student, head, -1
    yield "the teacher excludes all but twenty, one the label", student, head, n - 1
    half = torch.where(torch.arange(n) % 2 == 0, -inf, torch.rand(n))
    yield "the teacher excludes half", student, half, some | 1
    lowest = half.clone()
    lowest[n - 1 - n % 2] = -3.0  # the only one in the last bin, beside all that are excluded
    yield "one lowest beside the excluded", student, lowest, -1
    low = crowd.clone()
    low[60:80] = -1500.0
    yield "the student excludes what has no weight", torch.where(low == -1500, -inf, student), low, -1


@pytest.mark.parametrize("classes", [1025, 3001, 32000])
def test_the_certificate_holds(classes):
    unsorted = 0
    for name, student, teacher, label in adversaries(classes):
        student, teacher, target = student[None], teacher[None], torch.tensor([label])
        expected = truth(student, teacher, target)
        assert_right(run(student, teacher, target), expected)
        for tolerance in (1e-6, 1e-5, 1e-3, 0.3):
            values, gradient, bound = run(student, teacher, target, tolerance=tolerance)
            try:
                assert_bounded(values, gradient, bound, expected, tolerance)
            except AssertionError as error:
                raise AssertionError(f"{name}, tolerance {tolerance}") from error
            unsorted += int((bound > 1e-9).any())
    assert unsorted > 5  # the law says nothing about rows that were sorted


def test_the_certificate_in_float64():
    for _, student, teacher, label in adversaries(2001):
        student, teacher, target = student[None].double(), teacher[None].double(), torch.tensor([label])
        expected = truth(student, teacher, target)
        for tolerance in (1e-6, 1e-2):
            assert_bounded(*run(student, teacher, target, tolerance=tolerance), expected, tolerance)


def test_the_certificate_on_many_rows():
    for scale in (0.01, 1.0, 5.0):
        student, teacher = (scale * x for x in normal(40, 1500))
        target = labels_of(teacher)
        expected = truth(student, teacher, target)
        for tolerance in (1e-5, 1e-3, 1e-1):
            assert_bounded(*run(student, teacher, target, tolerance=tolerance), expected, tolerance)


def test_tolerance_zero_and_short_rows_are_exact():
    student, teacher = normal(4, 1024)
    exact = run(student, teacher)
    for short in (run(student, teacher, tolerance=0.1), run(student, teacher, tolerance=0.0)):
        for a, b in zip(short, exact, strict=True):
            assert_same(a, b)
    assert (exact[2] == 0).all()
    student, teacher = language(4, 3000)
    assert (run(student, teacher)[2] == 0).all()
    assert (run(student, teacher, tolerance=1e-3)[2] > 0).all()


def test_sixteen_bits_default_to_what_they_can_tell_apart():
    student, teacher = (x.bfloat16() for x in language(4, 4000))
    rows = luce.pld_loss(student, teacher, reduction="none", backend="cpu")
    of_loss, of_gradient = luce.pld_error_bound(student, teacher, backend="cpu")
    assert (of_gradient > 0).all()
    assert (of_gradient <= 1e-3).all()
    exact = luce.pld_loss(student, teacher, reduction="none", backend="cpu", tolerance=0)
    assert ((rows - exact).abs() <= of_loss + 4e-6 * exact).all()
    assert (luce.pld_error_bound(student.double(), teacher, backend="cpu")[0] == 0).all()


@pytest.mark.parametrize(
    "options", [{"top_k": 1}, {"top_k": 40}, {"epsilon": 0.1}, {"epsilon": 1e-3}], ids=str
)
def test_the_bounds_of_truncation(options):
    for classes in (50, 4000):
        for kind in KINDS:
            student, teacher = kind(6, classes)
            target = labels_of(teacher)
            values, gradient, bound = run(student, teacher, target, **options)
            full, slope = truth(student, teacher, target)
            left_out = full - values
            assert (left_out >= -VALUE * full).all()
            assert (left_out <= bound[:, 0] + VALUE * full).all()
            assert ((gradient - slope).abs().sum(-1) <= bound[:, 1] + VALUE).all()


def test_bounds_of_rows_that_do_not_count():
    student, teacher = normal(3, 8)
    student[0] = nan
    target = torch.tensor([-100, 1, 2])
    for options in ({}, {"top_k": 2}, {"epsilon": 0.5}, {"tolerance": 1.0}):
        bounds = luce.pld_error_bound(student, teacher, target, backend="cpu", **options)
        for bound in bounds:
            assert bound[0] == 0
            assert bound[1:].isfinite().all()
