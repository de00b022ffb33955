"""The native PLD: against float64, against the definition spelled out, and by laws.

Run as a program, it stores the results of `battery`: that is how other instruction sets are compared.
"""

from __future__ import annotations

import itertools
import math
import multiprocessing
import os
import platform
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal, localcontext

import pytest
import torch
from torch.testing import assert_close

import luce
from luce.ops import engines
from luce.ops.pld import PldOptions, pld, pld_with_bound, teacher_order

pytestmark = pytest.mark.skipif(
    engines.WHY_NOT is not None, reason=f"the native library is not in use: {engines.WHY_NOT}"
)

inf, nan = math.inf, math.nan
VALUE, GRADIENT = 2e-6, 1e-5
"""What float32 may differ from float64: of a row's value, and of the largest entry of its gradient."""
NOISE = {torch.float32: 1e-11, torch.float64: 1e-15}
"""Below this, nothing is promised: a class e**-27 times as likely as another may pass for impossible."""


def run(student, teacher, target=None, *, weight=None, order=None, backend="cpu", **options):
    """Values, gradient of their sum, and the certificates."""
    student = student.detach().requires_grad_()
    options = PldOptions(**options)
    values, bound = pld_with_bound(
        student, teacher, target, weight=weight, order=order, options=options, backend=backend
    )
    (gradient,) = torch.autograd.grad(values.sum(), student)
    return values.detach(), gradient, bound


def truth(student, teacher, target=None, *, weight=None, **options):
    """The reference in float64."""
    weight = None if weight is None else weight.double()
    options = {name: value for name, value in options.items() if name != "tolerance"}
    student, teacher = student.double(), teacher.double()
    values, gradient, _ = run(student, teacher, target, weight=weight, backend="reference", **options)
    return values, gradient


def assert_right(result, expected, value=VALUE, gradient=GRADIENT):
    """Every value and every entry of the gradient within its budget; infinities and NaN where they belong."""
    (v, g), (v0, g0) = (result[:2], expected)
    noise = NOISE[v.dtype]
    assert_close(v.double(), v0, rtol=value, atol=noise, equal_nan=True)
    defined = ~v0.isnan()
    g, g0 = g.double()[defined], g0[defined]
    largest = g0.abs().amax(1, keepdim=True)
    assert ((g - g0).abs() <= gradient * largest + noise).all(), ((g - g0).abs() / largest).max()


def assert_same(a, b):
    assert_close(a, b, rtol=0, atol=0, equal_nan=True)


# Rows


def normal(rows, classes):
    return torch.randn(rows, classes), torch.randn(rows, classes)


def image(rows, classes):
    """A few classes are likely, and the student has half understood which."""
    teacher = torch.randn(rows, classes) + 8 * (torch.rand(rows, classes) < 3 / classes)
    return 0.5 * teacher + torch.randn(rows, classes), teacher


def language(rows, classes):
    """Zipf's law, over classes in some order."""
    rank = torch.rand(rows, classes).argsort(-1) + 1
    teacher = -1.8 * rank.log() + 0.1 * torch.randn(rows, classes)
    return teacher + torch.randn(rows, classes), teacher


KINDS = [normal, image, language]


def labels_of(teacher):
    """In turn the last class, none, the first, and some class."""
    target = torch.randint(teacher.shape[1], teacher.shape[:1])
    target[::4] = teacher[::4].argmin(-1)
    target[1::4] = -1
    target[2::4] = teacher[2::4].argmax(-1)
    return target


# The definition, spelled out with forty digits and any exponent


def spelled_out(s, t, label, temperature=1.0, places=None, average=False, order=None):
    with localcontext() as context:
        context.prec = 40
        s, t = [Decimal(x) for x in s], [Decimal(x) for x in t]
        alpha = [((x - max(t)) / Decimal(temperature)).exp() for x in t]
        alpha = [a / sum(alpha) for a in alpha]
        worth = [(x - max(s)).exp() for x in s]
        order = sorted(range(len(t)), key=lambda i: (-t[i], i)) if order is None else order
        order = [i for i in order if i != label]
        groups = [[i] for i in order]
        if average:
            groups = [list(tied) for _, tied in itertools.groupby(order, key=lambda i: t[i])]
        if label >= 0:
            groups.insert(0, [label])
        groups = groups[:places]
        loss, gradient = Decimal(0), [Decimal(0)] * len(s)
        left = set(range(len(s)))
        for group in groups:
            left -= set(group)
            behind, own = sum(worth[i] for i in left), sum(worth[i] for i in group)
            half = Decimal(len(group) + 1) / (2 * len(group))
            z = behind + own * half
            mass = sum(alpha[i] for i in group)
            if mass == 0:
                continue
            for i in group:
                if alpha[i] > 0:
                    loss += alpha[i] * (z.ln() + max(s) - s[i]) if s[i].is_finite() else Decimal(inf)
                gradient[i] += mass * half * worth[i] / z - alpha[i]
            for i in left:
                gradient[i] += mass * worth[i] / z
        return float(loss), [float(g) for g in gradient]


SPELLED = {
    "exact": ({}, {}),
    "soft": ({"teacher_temperature": 4.0}, {"temperature": 4.0}),
    "sharp": ({"teacher_temperature": 0.3}, {"temperature": 0.3}),
    "one place": ({"top_k": 1}, {"places": 1}),
    "five places": ({"top_k": 5}, {"places": 5}),
    "ties": ({"average_ties": True}, {"average": True}),
}


@pytest.mark.parametrize("mode", SPELLED)
@pytest.mark.parametrize("spread", [1.0, 50.0, 1e3])
def test_against_the_definition(mode, spread):
    """Both engines, so that the oracle of all other tests has an oracle too."""
    options, spelled = SPELLED[mode]
    for classes in (1, 2, 3, 9, 31):
        student, teacher = spread * torch.randn(4, classes), spread * torch.randn(4, classes)
        teacher[2:] = (teacher[2:] / spread).round() * spread
        target = labels_of(teacher)
        rows = [
            spelled_out(*row, **spelled)
            for row in zip(student.tolist(), teacher.tolist(), target.tolist(), strict=True)
        ]
        expected = (
            torch.tensor([row[0] for row in rows], dtype=torch.float64),
            torch.tensor([row[1] for row in rows], dtype=torch.float64),
        )
        assert_right(truth(student, teacher, target, **options), expected, 1e-12, 1e-12)
        assert_right(run(student.double(), teacher.double(), target, **options), expected, 1e-12, 1e-12)
        assert_right(run(student, teacher, target, **options), expected)


# Against float64

FEW = [1, 2, 3, 7, 8, 9, 31, 32, 33, 100, 1000, 1001, 1024]
MANY = [1025, 5000]


@pytest.mark.parametrize("spread", [1.0, 50.0, 1e3, 1e4])
@pytest.mark.parametrize("classes", FEW + MANY)
def test_exact(classes, spread):
    for kind in KINDS:
        student, teacher = (spread * x for x in kind(8, classes))
        target = labels_of(teacher)
        expected = truth(student, teacher, target)
        assert_right(run(student, teacher, target), expected)
        assert_right(run(student.double(), teacher.double(), target), expected, 1e-12, 1e-12)


@pytest.mark.parametrize(("rows", "classes"), [(2, 32000), (1, 128256)])
def test_long_rows(rows, classes):
    for kind, spread in ((normal, 1.0), (language, 1.0), (normal, 50.0)):
        student, teacher = (spread * x for x in kind(rows, classes))
        target = labels_of(teacher)
        expected = truth(student, teacher, target)
        assert_right(run(student, teacher, target), expected)
        values, gradient, bound = run(student, teacher, target, tolerance=1e-5)
        assert_bounded(values, gradient, bound, expected, 1e-5)


def test_long_rows_of_equals():
    """Whose sums all round in the same direction, if they are not kept in double."""
    student, teacher = torch.full((2, 60000), -0.3), torch.randn(2, 60000)
    student[:, 5] = 0.0
    teacher[1] = 1e-3 * teacher[1]
    for options in ({}, {"top_k": 500}):
        assert_right(run(student, teacher, **options), truth(student, teacher, **options), 2e-7, 2e-6)


@pytest.mark.parametrize("gap", [10, 30, 50, 59, 61, 87, 95, 110, 1000])
@pytest.mark.parametrize("classes", [3, 10, 1000, 1500])
def test_one_logit_far_above_the_rest(gap, classes):
    """Then most suffixes live far below the row's top, where the rounding of differences would show."""
    for place in (0, classes // 2):
        student, teacher = normal(40 if classes < 100 else 4, classes)
        student[:, place] += gap
        teacher[:, place] -= 2
        target = torch.full(student.shape[:1], place)
        target[1::2] = -1
        assert_right(run(student, teacher, target), truth(student, teacher, target))


@pytest.mark.parametrize("classes", [9, 100, 1000, 1500])
def test_certain_students(classes):
    """The losses are small: what is chosen is all but certain."""
    teacher = torch.randn(8, classes)
    student = 40 * teacher + torch.randn(8, classes)
    target = teacher.argmax(-1)
    assert_right(run(student, teacher, target), truth(student, teacher, target))
    assert_right(run(student / 20, teacher, target), truth(student / 20, teacher, target))


@pytest.mark.parametrize(("dtype", "rel"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_certain_students_of_wide_rows(dtype, rel):
    student, teacher = torch.tensor([[0.0, -30.0, -1000.0]]), torch.tensor([[1.0, 0.0, -1.0]])
    value = run(student.to(dtype), teacher.to(dtype))[0].item()
    alpha = math.e / (math.e + 1 + math.exp(-1))
    assert value == pytest.approx(alpha * math.log1p(math.exp(-30)), rel=rel, abs=0)


@pytest.mark.parametrize(
    "options",
    [
        {"top_k": 1},
        {"top_k": 5},
        {"top_k": 128},
        {"top_k": 5000},
        {"epsilon": 0.5},
        {"epsilon": 1e-2},
        {"epsilon": 1e-4},
        {"top_k": 20, "epsilon": 0.1},
        {"average_ties": True},
        {"teacher_temperature": 0.3},
        {"teacher_temperature": 4.0},
        {"teacher_temperature": 4.0, "top_k": 16},
        {"teacher_temperature": 0.3, "epsilon": 1e-3},
    ],
    ids=str,
)
@pytest.mark.parametrize("classes", [1, 7, 100, 1000, 1025, 5000])
def test_modes(options, classes):
    for kind in KINDS:
        student, teacher = kind(8, classes)
        teacher[4:] = (4 * teacher[4:]).round() / 4
        target = labels_of(teacher)
        expected = truth(student, teacher, target, **options)
        assert_right(run(student, teacher, target, **options), expected)
        assert_right(run(student.double(), teacher.double(), target, **options), expected, 1e-12, 1e-12)


@pytest.mark.parametrize("spread", [50.0, 1e4])
@pytest.mark.parametrize("options", [{"top_k": 16}, {"epsilon": 1e-3}, {"average_ties": True}], ids=str)
def test_modes_of_wide_rows(options, spread):
    for classes in (9, 1000, 3000):
        student, teacher = normal(6, classes)
        student, teacher = spread * student, (spread * teacher).round()
        target = labels_of(teacher)
        assert_right(run(student, teacher, target, **options), truth(student, teacher, target, **options))


@pytest.mark.parametrize("top_k", [1, 31, 100])
def test_labels_inside_and_outside_the_first_places(top_k):
    classes = 4000
    student, teacher = normal(5, classes)
    order = teacher_order(teacher)
    for place in (0, top_k - 1, top_k, top_k + 1, classes - 1):
        target = order[:, place].contiguous()
        expected = truth(student, teacher, target, top_k=top_k)
        assert_right(run(student, teacher, target, top_k=top_k), expected)


def test_first_places_whose_candidates_are_too_many():
    """All classes tie at the last place that counts."""
    student, teacher = torch.randn(2, 4000), torch.zeros(2, 4000)
    teacher[:, 100:103] = 1.0
    for target in (None, torch.tensor([50, 101])):
        assert_right(run(student, teacher, target, top_k=8), truth(student, teacher, target, top_k=8))


@pytest.mark.parametrize("epsilon", [0.3, 0.01])
def test_epsilon_counts_as_few_places_as_it_may(epsilon):
    """Certain by the definition: the gradient of a class that has no term is not negative."""
    student, teacher = language(6, 5000)
    _, gradient, bound = run(student, teacher, epsilon=epsilon)
    order, alpha = teacher_order(teacher), teacher.double().softmax(-1)
    ranked = alpha.gather(-1, order)
    places = ((1 - ranked.cumsum(-1)) >= epsilon).sum(-1) + 1
    sign = gradient.gather(-1, order)
    for row, k in enumerate(places.tolist()):
        assert (sign[row, k:] >= 0).all()
        left = float(1 - ranked[row, :k].sum())
        assert left < epsilon <= left + ranked[row, k - 1]
        assert_close(bound[row, 1].item(), 2 * left, rtol=1e-3, atol=0)


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


def assert_bounded(values, gradient, bound, expected, tolerance):
    value, slope = expected
    assert ((values - value).abs() <= bound[:, 0] + VALUE * value.abs()).all(), (values - value, bound)
    assert ((gradient - slope).abs().sum(-1) <= bound[:, 1] + VALUE * slope.abs().sum(-1)).all(), (
        (gradient - slope).abs().sum(-1),
        bound,
    )
    assert (bound <= tolerance * (1 + 1e-6)).all()


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
    """As the teacher grows sure of the label, what is left is cross-entropy."""
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
    """PyTorch can fill new memory with NaN, so that what is not written shows."""
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


# Layouts and dtypes


def layouts(block):
    """The same numbers, laid out in every way: (name, view)."""
    yield "contiguous", block.contiguous()
    for dims in itertools.permutations(range(block.ndim)):
        back = sorted(range(block.ndim), key=dims.__getitem__)
        yield f"order {dims}", block.permute(dims).contiguous().permute(back)
    wide = torch.full([2 * size + 1 for size in block.shape], -9).to(block.dtype)
    inside = wide[tuple(slice(1, None, 2) for _ in block.shape)]
    yield "sliced", inside.copy_(block)
    yield "narrowed", torch.cat([block, block], 1)[:, : block.shape[1]]


@pytest.mark.parametrize("shape", [(5, 9), (3, 9, 21), (2, 1500, 3), (2, 1, 18), (1, 40, 1), (33, 2, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layouts(shape, dtype):
    """Every layout of one network beside every layout of the other."""
    student, teacher = torch.randn(shape), torch.randn(shape).to(dtype)
    rows = shape[:1] + shape[2:]
    target, weight = torch.randint(-1, shape[1], rows), torch.rand(rows).round(decimals=1)
    expected = run(student, teacher, target, weight=weight, backend="reference")
    order = teacher.sort(dim=1, descending=True, stable=True).indices
    for (name, s), (other, t) in itertools.product(layouts(student), layouts(teacher)):
        values, gradient, _ = run(s, t, target, weight=weight)
        assert_close(
            values, expected[0], rtol=1e-5, atol=1e-6, msg=lambda m, n=name, o=other: f"{n}/{o}: {m}"
        )
        assert_close(
            gradient, expected[1], rtol=1e-4, atol=1e-6, msg=lambda m, n=name, o=other: f"{n}/{o}: {m}"
        )
        narrow, slope, _ = run(s.to(dtype), t, target, weight=weight)
        wide, rounded, _ = run(student.to(dtype).float(), t, target, weight=weight)
        assert_same(narrow, wide)
        assert_same(slope, rounded.to(dtype))
    for _, places in layouts(order):
        values, gradient, _ = run(student, teacher, target, weight=weight, order=places)
        assert_close(values, expected[0], rtol=1e-5, atol=1e-6)
        assert_close(gradient, expected[1], rtol=1e-4, atol=1e-6)


def test_expanded_logits():
    one, row = torch.randn(1, 7), torch.randn(3, 7)
    values, gradient, _ = run(one.expand(3, 7), row)
    assert_close(values, run(one.repeat(3, 1), row)[0])
    assert_close(gradient, run(one.repeat(3, 1), row)[1])
    column = torch.randn(3, 1)
    for student, teacher in ((column.expand(3, 7), row), (row, column.expand(3, 7)), (row, one.expand(3, 7))):
        for result, expected in zip(
            run(student, teacher), run(student.contiguous(), teacher.contiguous()), strict=True
        ):
            assert_same(result, expected)
    pixels = torch.randn(2, 5, 1).expand(2, 5, 40)
    assert_same(run(pixels, pixels)[1], run(pixels.contiguous(), pixels.contiguous())[1])


@pytest.mark.parametrize("shape", [(0, 5), (0, 5, 3), (4, 5, 0)])
def test_no_rows(shape):
    rows = shape[:1] + shape[2:]
    student, target = torch.randn(shape), torch.zeros(rows, dtype=torch.long)
    order = torch.zeros(shape, dtype=torch.int32)
    values, gradient, bound = run(student, student, target, weight=torch.ones(rows), order=order)
    assert (values.shape, gradient.shape, bound.shape) == (rows, shape, (0, 2))


FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.mark.parametrize(("of_student", "of_teacher"), list(itertools.product(FLOATS, FLOATS)))
def test_dtypes(of_student, of_teacher):
    for classes in (7, 1000, 1500):
        student, teacher = (
            x.to(d) for x, d in zip(normal(6, classes), (of_student, of_teacher), strict=True)
        )
        target = labels_of(teacher)
        values, gradient, bound = run(student, teacher, target)
        wide = torch.float64 if torch.float64 in (of_student, of_teacher) else torch.float32
        assert (values.dtype, bound.dtype, gradient.dtype) == (wide, wide, of_student)
        v, g, _ = run(student.to(wide), teacher.to(wide), target)
        assert_same(values, v)
        assert_same(gradient, g.to(of_student))
        assert_right((v, g), truth(student, teacher, target))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_number_of_sixteen_bits(dtype):
    """Read and written as PyTorch itself does, the smallest and those that overflow among them."""
    every = torch.arange(65536).to(torch.uint16).view(dtype).reshape(64, 1024)
    every = every[:, torch.randperm(1024)]
    zero = torch.zeros(64, 1024)
    for weight in (None, torch.full((64,), 1e7), torch.full((64,), 1e-3)):
        for student, teacher in ((zero.to(dtype), every), (every, zero), (every.t(), zero.t())):
            rows = student.shape[0]
            w = None if weight is None else weight[:1].expand(rows).contiguous()
            values, gradient, _ = run(student, teacher, weight=w)
            v, g, _ = run(student.float(), teacher.float(), weight=w)
            assert_same(values, v)
            assert_same(gradient, g.to(student.dtype))


def rounded_gradients(dtype):
    """Gradients that are any float32 we like, in 16 bits, and PyTorch's rounding of them.

    With two equal student logits and all of the teacher's probability on the label, a row's gradient is minus
    and plus half of its weight.
    """
    every = torch.arange(65536).to(torch.uint16).view(dtype).float()
    every = every[every.isfinite() & (every.abs() < 1e38)]
    upwards = torch.nextafter(every, torch.tensor(inf))
    middle = (every.double() + torch.cat([every[1:], every[-1:]]).double()) / 2
    middle = torch.cat([middle.float(), torch.tensor([65519.0, 65520.0, 65521.0, 1e6])])
    wanted = torch.cat([every, upwards, middle, torch.nextafter(middle, torch.tensor(0.0))])
    wanted = wanted[(wanted != 0) & (wanted.abs() > 2.0**-126)]
    student, teacher = (
        torch.zeros(len(wanted), 2, dtype=dtype),
        torch.tensor([0.0, -1e4]).expand(len(wanted), 2),
    )
    _, gradient, _ = run(student, teacher, torch.zeros(len(wanted), dtype=torch.long), weight=2 * wanted)
    return gradient, torch.stack([-wanted, wanted], 1).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_round_to_even(dtype):
    assert_same(*rounded_gradients(dtype))


def test_a_tile_of_one_network_beside_rows_of_the_other():
    """In a thread of its own, whose scratch memory is not yet large enough for anything."""
    student, teacher = torch.randn(1, 30000, 16), torch.randn(1, 16, 30000).bfloat16().transpose(1, 2)
    expected = run(student, teacher.float().contiguous())
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(run, student, teacher).result()
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(run, teacher, student).result()
    for one, two in zip(found, expected, strict=True):
        assert_same(one, two)
    assert_same(other[0], run(teacher.float().contiguous(), student)[0])


# Wrong arguments


def call(student=None, teacher=None, target=None, weight=None, order=None):
    student = torch.randn(3, 4) if student is None else student
    teacher = torch.randn(3, 4) if teacher is None else teacher
    return torch.ops.luce.pld(student, teacher, target, weight, order, 1.0, 2**62, 0.0, 0.0, False, True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"student": torch.randn(4)}, "`student` of shape"),
        ({"student": torch.randn(3, 4, 1, 1)}, "`student` of shape"),
        ({"student": torch.tensor(1.0)}, "`student` of shape"),
        ({"teacher": torch.randn(4)}, "`teacher` of shape"),
        ({"teacher": torch.randn(3, 5)}, "`teacher` of the same shape"),
        ({"teacher": torch.randn(2, 4)}, "`teacher` of the same shape"),
        ({"teacher": torch.randn(3, 4, 2)}, "`teacher` of the same shape"),
        ({"student": torch.zeros(3, 4, dtype=torch.long)}, "`student` of a floating dtype"),
        ({"teacher": torch.zeros(3, 4, dtype=torch.int32)}, "`teacher` of a floating dtype"),
        ({"teacher": torch.zeros(3, 4, dtype=torch.bool)}, "`teacher` as float32"),
        ({"teacher": torch.zeros(3, 4, dtype=torch.complex64)}, "`teacher` as float32"),
        ({"student": torch.randn(3, 0), "teacher": torch.randn(3, 0)}, "at least one class"),
        ({"target": torch.zeros(3, dtype=torch.int32)}, "`target` as one number a row"),
        ({"target": torch.zeros(3)}, "`target` as one number a row"),
        ({"target": torch.zeros(2, dtype=torch.long)}, "`target` as one number a row"),
        ({"target": torch.zeros(6, dtype=torch.long)[::2]}, "`target` as one number a row"),
        ({"weight": torch.zeros(3, dtype=torch.float64)}, "`weight` as one number a row"),
        ({"weight": torch.zeros(4)}, "`weight` as one number a row"),
        ({"weight": torch.zeros(1).expand(3)}, "`weight` as one number a row"),
        ({"order": torch.zeros(3, 4)}, "`order` of int64 or int32"),
        ({"order": torch.zeros(3, 5, dtype=torch.long)}, "`order` of the same shape"),
        ({"order": torch.zeros(3, dtype=torch.long)}, "`order` of shape"),
        ({"order": torch.tensor([[0, 1, 2, 3]]).expand(3, 4) + 1}, "every class once"),
        ({"order": torch.tensor([[0, 1, 2, 2]]).expand(3, 4)}, "every class once"),
        ({"order": torch.tensor([[0, 1, 2, -1]]).expand(3, 4)}, "every class once"),
        ({"order": torch.tensor([[0, 1, 2, 2**40]]).expand(3, 4)}, "every class once"),
        (
            {"order": torch.tensor([[0, 1, 2, -(2**31)]], dtype=torch.int32).expand(3, 4)},
            "hold every class once",
        ),
    ],
)
def test_wrong_arguments_raise(arguments, message):
    with pytest.raises(RuntimeError, match=message):
        call(**arguments)


def test_an_order_may_be_wrong_in_one_row_only():
    order = torch.arange(4).repeat(3, 1)
    order[2, 0] = 3
    with pytest.raises(RuntimeError, match="every class once"):
        call(order=order)
    assert call(order=order, weight=torch.tensor([1.0, 1.0, 0.0]))[0][2] == 0  # not looked at
    with pytest.raises(RuntimeError, match="every class once"):
        call(order=order, target=torch.full((3,), 3))


# Threads


def test_the_number_of_threads_changes_nothing():
    for shape in ((3, 5000), (700, 9), (2, 30, 100)):
        student, teacher = torch.randn(2, *shape)
        results = []
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            results.append(run(student, teacher, tolerance=1e-3))
        torch.set_num_threads(1)
        for result in results[1:]:
            for one, other in zip(result, results[0], strict=True):
                assert_same(one, other)


def test_an_error_in_another_thread_is_raised():
    order = torch.arange(2000).repeat(16, 1)
    order[15, 7] = 8
    torch.set_num_threads(2)
    with pytest.raises(RuntimeError, match="every class once"):
        run(torch.randn(16, 2000), torch.randn(16, 2000), order=order)


def test_called_from_several_threads_at_once():
    """Each has its own scratch memory, whatever sizes come one after the other."""
    cases = []
    for classes in (5, 3000, 100, 1025, 31, 2000):
        for options in ({}, {"top_k": 3}, {"tolerance": 1e-3}):
            student, teacher = normal(4, classes)
            cases.append((student, teacher, options, run(student, teacher, **options)))

    def all_again(shift):
        for student, teacher, options, expected in cases[shift:] + cases[:shift]:
            for one, other in zip(run(student, teacher, **options), expected, strict=True):
                assert_same(one, other)
        return True

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(all_again, range(12)))


def _in_a_child(student, teacher, expected):
    torch.set_num_threads(1)  # as the workers of a data loader do: OpenMP's own threads are not forked
    for one, other in zip(run(student, teacher, tolerance=1e-3), expected, strict=True):
        assert_same(one, other)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_forked_after_use():
    student, teacher = normal(8, 3000)
    torch.set_num_threads(2)
    expected = run(student, teacher, tolerance=1e-3)
    child = multiprocessing.get_context("fork").Process(target=_in_a_child, args=(student, teacher, expected))
    child.start()
    child.join(60)
    code = child.exitcode
    child.kill()
    assert code == 0


def test_other_threads_go_on_meanwhile():
    """Seen in the middle of a call, where no Python code of this thread runs."""
    student, teacher = torch.randn(2, 24, 60000)
    stamps, done = [], threading.Event()

    def watch():
        while not done.wait(0.001):
            stamps.append(time.perf_counter())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        for _ in range(10):
            start = time.perf_counter()
            call(student, teacher)
            took = time.perf_counter() - start
            if any(start + took / 4 < stamp < start + 3 * took / 4 for stamp in stamps):
                return
    finally:
        done.set()
        watcher.join()
    pytest.fail("no other thread ran during ten calls")


# Instruction sets


def battery():
    """A little of everything, from a generator of its own: inputs with their results."""
    generator = torch.Generator().manual_seed(3)
    cases = []
    for classes in (1, 3, 9, 33, 1000, 1024, 1025, 3000):
        for spread in (1.0, 50.0, 1e4):
            student, teacher = spread * torch.randn(2, 3, classes, generator=generator)
            target = torch.tensor([-1, 0, classes - 1])
            if classes > 1:
                student[2, 0] = -inf
            if classes > 9:
                teacher[1, 1 : classes // 2] = -inf
            for options in (
                {},
                {"top_k": 4},
                {"tolerance": 1e-3},
                {"average_ties": True},
                {"teacher_temperature": 3.0},
            ):
                for dtype in (torch.float32, torch.float64):
                    inputs = (student.to(dtype), teacher.to(dtype), target)
                    cases.append((*inputs, options, run(*inputs, **options)))
    every = torch.arange(65536).to(torch.uint16).reshape(64, 1024)
    for student in (every.clone().view(torch.float16), every.clone().view(torch.bfloat16)):
        cases.append((student, torch.zeros(64, 1024), None, {}, run(student, torch.zeros(64, 1024))))
        assert_same(*rounded_gradients(student.dtype))
    return cases


@pytest.mark.skipif(platform.machine().lower() not in ("x86_64", "amd64"), reason="not an x86-64 processor")
@pytest.mark.parametrize("name", ["x86-64-v2", "x86-64-v3"])
def test_instruction_sets(name, tmp_path):
    current = engines.describe()["instruction_set"].split()[0]
    if current <= name:
        pytest.skip(f"this processor offers no more than {current}, which all other tests run on")
    found = tmp_path / "found.pt"
    environment = {**os.environ, "LUCE_INSTRUCTION_SET": name, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, __file__, found], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    used, cases = torch.load(found, weights_only=True)
    assert used.startswith(name)
    for (*inputs, options, other), (*_, here) in zip(cases, battery(), strict=True):
        precise = inputs[0].dtype == torch.float64
        largest = here[1].abs().float().nan_to_num(0, 0).amax(1, keepdim=True)
        loose = options.get("tolerance", 0)
        assert_close(
            other[0],
            here[0],
            rtol=1e-12 if precise else 1e-6,
            atol=NOISE[here[0].dtype] + loose,
            equal_nan=True,
        )
        unit = 1e-12 if precise else 2e-6 if inputs[0].dtype == torch.float32 else 2**-7
        apart = (other[1].float() - here[1].float()).nan_to_num(0).abs()
        assert (apart <= unit * largest + loose + NOISE[here[0].dtype] + (1e-7 if unit > 1e-3 else 0)).all()
        expected = (
            truth(*inputs) if not options and inputs[0].dtype in (torch.float32, torch.float64) else None
        )
        if expected is not None and expected[0].isfinite().all():
            assert_right(other, expected)
        if inputs[0].dtype in (torch.float16, torch.bfloat16) and inputs[2] is None:
            assert_close(other[1].isnan(), here[1].isnan())


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


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.save((engines.describe()["instruction_set"], battery()), sys.argv[1])
