"""The native PLD against its definition and against float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

from luce.ops.pld import teacher_order

from .pld_cases import (
    KINDS,
    assert_bounded,
    assert_right,
    labels_of,
    language,
    native,
    normal,
    run,
    spelled_out,
    truth,
)

pytestmark = native

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
    """Their sums would all round in the same direction in float32."""
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
    """The losses are small: each choice is almost certain."""
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
