"""NKD, total variation, weighted soft labels and teacher-free KD."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

import luce

from . import formulas
from .catalogue import UNLABELLED, batch
from .test_golden import S, T, Y, digits, gradient, mean, value
from .test_laws import TEMPERATURE, laws, rows, slope

exp, log, inf = math.exp, math.log, math.inf


def others(row, y):
    return [*row[:y], *row[y + 1 :]]


def nkd(s, t, y, gamma, temperature):
    """The formula in Python floats."""
    target = -formulas.softmax(t)[y] * formulas.log_softmax(s)[y]
    p = formulas.softmax(others(t, y), temperature)
    log_q = formulas.log_softmax(others(s, y), temperature)
    return target - gamma * temperature**2 * math.fsum(a * b for a, b in zip(p, log_q, strict=True))


def tvd(s, t, temperature=1.0):
    p, q = formulas.softmax(t, temperature), formulas.softmax(s, temperature)
    return math.fsum(abs(a - b) for a, b in zip(p, q, strict=True)) / 2


def wsld(s, t, y, temperature):
    ratio = formulas.cross_entropy(s, y) / (formulas.cross_entropy(t, y) + 1e-7)
    return (1 - exp(-ratio)) * formulas.kd(s, t, temperature)


def tfkd(s, y, a, temperature):
    virtual = [log(a) if i == y else log((1 - a) / (len(s) - 1)) for i in range(len(s))]
    return formulas.kd(s, virtual, temperature)


@laws
@given(rows(), TEMPERATURE)
def test_they_are_their_formulas(data, temperature):
    student, teacher, target = data
    s, t, y = student[0].tolist(), teacher[0].tolist(), int(target)
    for result, expected in (
        (
            luce.nkd_loss(student, teacher, target, gamma=0.7, temperature=temperature),
            nkd(s, t, y, 0.7, temperature),
        ),
        (luce.tvd_loss(student, teacher, temperature=temperature), tvd(s, t, temperature)),
        (luce.wsld_loss(student, teacher, target, temperature=temperature), wsld(s, t, y, temperature)),
        (
            luce.tfkd_loss(student, target, correct_probability=0.8, temperature=temperature),
            tfkd(s, y, 0.8, temperature),
        ),
    ):
        assert result.item() == pytest.approx(expected, rel=1e-9, abs=1e-12)


# NKD


def test_nkd_spelled_out():
    """Three classes, label 0: the teacher gives it a half, and of the others three quarters to class 1."""
    t, s = [log(4.0), log(3.0), log(1.0)], [0.0, log(2.0), 0.0]
    expected = -0.5 * log(1 / 4) - 1.5 * (3 / 4 * log(2 / 3) + 1 / 4 * log(1 / 3))
    assert value(luce.nkd_loss, s, t, 0) == pytest.approx(expected, rel=1e-12)


def test_nkd():
    assert value(luce.nkd_loss, S, T, Y, gamma=0.0) == digits(0.662991)
    assert value(luce.nkd_loss, S, T, Y) - 0.662991 == pytest.approx(1.757068, abs=1e-6)
    assert value(luce.nkd_loss, S, T, Y) == digits(2.420060)
    assert value(luce.nkd_loss, S, T, Y, gamma=3.5, temperature=3.0) == digits(35.767053)


@laws
@given(rows(), TEMPERATURE)
def test_the_gradient_of_nkd(data, temperature):
    student, teacher, target = data
    y, gamma = int(target), 0.7
    rest = torch.arange(student.shape[-1]) != y
    q, p = student.softmax(-1)[0], teacher.softmax(-1)[0]
    expected = p[y] * (q - F.one_hot(target, len(q))[0])
    q_rest = (student / temperature)[0, rest].softmax(-1)
    p_rest = (teacher / temperature)[0, rest].softmax(-1)
    expected[rest] += gamma * temperature * (q_rest - p_rest)
    result = slope(luce.nkd_loss, student, teacher, target, gamma=gamma, temperature=temperature)
    assert_close(result[0], expected, rtol=1e-9, atol=1e-12)


def test_nkd_without_the_others_is_cross_entropy_weighted_by_the_teacher_and_the_first_choice_of_pld():
    student, teacher, target = batch(6)
    values = luce.nkd_loss(student, teacher, target, gamma=0.0, reduction="none")
    p = teacher.softmax(-1).gather(-1, target[:, None])[:, 0]
    assert_close(values, p * luce.cross_entropy_loss(student, target, reduction="none"))
    assert_close(values, luce.pld_loss(student, teacher, target, top_k=1, reduction="none"))


def test_nkd_is_dkd_s_second_part_up_to_the_teacher_s_entropy():
    student, teacher, target = batch(6)
    of_others = luce.nkd_loss(student, teacher, target, gamma=1.0, temperature=2.0, reduction="none")
    of_others = of_others - luce.nkd_loss(student, teacher, target, gamma=0.0, reduction="none")
    nckd = luce.dkd_loss(student, teacher, target, alpha=0.0, beta=1.0, temperature=2.0, reduction="none")
    at_equality = luce.nkd_loss(teacher, teacher, target, gamma=1.0, temperature=2.0, reduction="none")
    entropy = at_equality - luce.nkd_loss(teacher, teacher, target, gamma=0.0, reduction="none")
    assert_close(of_others, nckd + entropy)


def test_nkd_switches_the_others_off_even_if_they_are_infinite():
    student, teacher, _ = batch(3)
    student[:, 4] = -inf
    target = torch.tensor([0, 1, 2])
    assert luce.nkd_loss(student, teacher, target).item() == inf
    assert luce.nkd_loss(student, teacher, target, gamma=0.0).isfinite()


def test_nkd_of_a_teacher_that_knows_only_the_label():
    student, teacher, _ = batch(2)
    target = torch.tensor([3, 3])
    teacher[:, :3] = teacher[:, 4] = -inf
    assert_close(
        luce.nkd_loss(student, teacher, target, temperature=2.0), luce.cross_entropy_loss(student, target)
    )


# Total variation


def test_tvd_spelled_out():
    """(1/2, 1/4, 1/4) against (1/4, 1/4, 1/2): a quarter lies elsewhere."""
    p, q = [0.5, 0.25, 0.25], [0.25, 0.25, 0.5]
    assert value(luce.tvd_loss, [map_log(q)], [map_log(p)]) == pytest.approx(0.25, rel=1e-12)
    # At temperature 2: roots, in units of their sums.
    root, unit = math.sqrt(0.5), 1 + math.sqrt(0.5)
    expected = (root - 0.5) / unit
    assert value(luce.tvd_loss, [map_log(q)], [map_log(p)], temperature=2.0) == pytest.approx(expected)


def map_log(row):
    return [log(x) for x in row]


def test_tvd():
    assert value(luce.tvd_loss, S, T) == pytest.approx(mean(tvd, S, T), rel=1e-12)
    result = gradient(luce.tvd_loss, S, T)
    for row, s, t in zip(result, S, T, strict=True):
        q = formulas.softmax(s)
        sign = [math.copysign(1, a - b) for a, b in zip(q, formulas.softmax(t), strict=True)]
        tilt = math.fsum(a * b for a, b in zip(q, sign, strict=True))
        assert row == pytest.approx([0.5 * 0.5 * a * (b - tilt) for a, b in zip(q, sign, strict=True)])


@laws
@given(rows(), TEMPERATURE)
def test_tvd_is_a_distance_below_one_and_below_the_root_of_kl(data, temperature):
    student, teacher, _ = data
    result = luce.tvd_loss(student, teacher, temperature=temperature).item()
    assert 0 <= result <= 1
    assert result == pytest.approx(luce.tvd_loss(teacher, student, temperature=temperature).item(), rel=1e-12)
    kl = luce.kd_loss(student, teacher, temperature=temperature, scale_by_temperature=False).item()
    assert result <= math.sqrt(kl / 2) + 1e-12
    third = student.roll(1, -1)
    detour = luce.tvd_loss(third, teacher, temperature=temperature)
    detour = detour + luce.tvd_loss(student, third, temperature=temperature)
    assert result <= detour.item() + 1e-12


def test_tvd_of_networks_that_share_no_class_is_one():
    student = torch.tensor([[0.0, -inf, 0.3]])
    teacher = torch.tensor([[-inf, 2.0, -inf]])
    assert luce.tvd_loss(student, teacher).item() == pytest.approx(1.0, rel=1e-6)


def test_tvd_falls_as_one_over_the_temperature():
    student, teacher, _ = batch(4)
    values = [1e4 * luce.tvd_loss(student, teacher, temperature=1e4)]
    values.append(2e4 * luce.tvd_loss(student, teacher, temperature=2e4))
    assert_close(values[0], values[1], rtol=1e-3, atol=0)


# Weighted soft labels


def test_wsld_spelled_out():
    """Two classes, label 0. Student even: log 2. Teacher three to one: log 4/3. At temperature 1."""
    kl = 3 / 4 * log(3 / 2) + 1 / 4 * log(1 / 2)
    weight = 1 - exp(-log(2) / (log(4 / 3) + 1e-7))
    result = value(luce.wsld_loss, [0.0, 0.0], [log(3.0), 0.0], 0, temperature=1.0)
    assert result == pytest.approx(weight * kl, rel=1e-12)


def test_wsld_is_the_code_of_its_authors_but_for_the_teacher_s_entropy():
    student, teacher, target = batch(6)
    temperature = 2.0
    soft = -((teacher / temperature).softmax(-1) * (student / temperature).log_softmax(-1)).sum(-1)
    own = -((teacher / temperature).softmax(-1) * (teacher / temperature).log_softmax(-1)).sum(-1)
    ratio = F.cross_entropy(student, target, reduction="none") / (
        F.cross_entropy(teacher, target, reduction="none") + 1e-7
    )
    expected = temperature**2 * ((1 - torch.exp(-ratio)) * (soft - own)).mean()
    assert_close(luce.wsld_loss(student, teacher, target), expected)


def weight_of(student, teacher, target):
    ratio = F.cross_entropy(student, target, reduction="none") / (
        F.cross_entropy(teacher, target, reduction="none") + 1e-7
    )
    return 1 - torch.exp(-ratio)


@laws
@given(rows(), TEMPERATURE)
def test_the_gradient_of_wsld_is_that_of_kd_times_a_weight_that_is_no_function(data, temperature):
    student, teacher, target = data
    weight = weight_of(student, teacher, target)
    result = slope(luce.wsld_loss, student, teacher, target, temperature=temperature)
    expected = slope(luce.kd_loss, student, teacher, temperature=temperature)
    assert_close(result, weight[:, None] * expected, rtol=1e-9, atol=1e-12)
    assert 0 <= weight <= 1


def test_gradcheck_of_wsld_with_its_weight_held():
    student, teacher, target = batch(4, classes=4)
    target[1] = UNLABELLED
    weight = weight_of(student, teacher, target.clamp(min=0)).masked_fill(target < 0, 0)
    held = student.clone().requires_grad_()
    torch.autograd.gradcheck(
        lambda s: luce.kd_loss(s, teacher, temperature=2.0, row_weight=weight, reduction="none"), held
    )
    expected = luce.kd_loss(held, teacher, temperature=2.0, row_weight=weight, reduction="sum")
    (expected,) = torch.autograd.grad(expected, held)
    assert_close(slope(luce.wsld_loss, student, teacher, target, reduction="sum"), expected)


def test_wsld_of_rows_whose_label_the_student_or_the_teacher_is_sure_of():
    student, teacher = torch.zeros(3, 3), torch.zeros(3, 3)
    student[0, 0], teacher[1, 0], teacher[2, 0] = 200.0, 200.0, -200.0
    target = torch.zeros(3, dtype=torch.long)
    kd = luce.kd_loss(student, teacher, temperature=2.0, reduction="none")
    values = luce.wsld_loss(student, teacher, target, reduction="none")
    assert values[0] == 0  # the student knows it: nothing to learn, however far the teacher is
    # The teacher knows it and the student does not: all of it.
    assert values[1].item() == pytest.approx(kd[1].item())
    # The teacher is wrong by 200 nats and log 2, and the student by log 3: hardly anything.
    expected = kd[2].item() * (1 - exp(-log(3) / (200 + log(2))))
    assert values[2].item() == pytest.approx(expected, rel=1e-5)


def test_wsld_of_a_row_of_weight_nothing_may_be_infinite():
    student = torch.tensor([[200.0, -inf, 0.0]])
    assert luce.wsld_loss(student, torch.zeros(1, 3), torch.tensor([0])) == 0


# Teacher-free KD


def test_tfkd_spelled_out():
    """Three classes, an even student: at temperature 2 the teacher is the roots of 0.9, 0.05 and 0.05."""
    root, rest = math.sqrt(0.9), math.sqrt(0.05)
    p = [x / (root + 2 * rest) for x in (root, rest, rest)]
    expected = 4 * math.fsum(x * log(3 * x) for x in p)
    result = luce.tfkd_loss(
        torch.zeros(1, 3, dtype=torch.float64), torch.tensor([0]), correct_probability=0.9, temperature=2.0
    )
    assert result.item() == pytest.approx(expected, rel=1e-12)


def test_tfkd_at_temperature_one_is_smoothed_cross_entropy_up_to_a_constant():
    """Smoothing gives each class epsilon / C and the label the rest: a = 1 - epsilon + epsilon / C."""
    student, _, target = batch(6)
    epsilon, classes = 0.1, 5
    a = 1 - epsilon + epsilon / classes
    virtual = torch.full((classes,), (1 - a) / (classes - 1), dtype=torch.float64)
    virtual[0] = a
    entropy = -(virtual * virtual.log()).sum()
    result = luce.tfkd_loss(student, target, correct_probability=a, temperature=1.0)
    expected = luce.cross_entropy_loss(student, target, label_smoothing=epsilon) - entropy
    assert_close(result, expected)


@pytest.mark.parametrize("temperature", [20.0, 40.0])
def test_the_code_of_the_authors_of_tfkd_as_its_docstring_says(temperature):
    student, _, target = batch(6)
    classes, a = 5, 0.99
    virtual = torch.full_like(student, (1 - a) / (classes - 1))
    virtual[torch.arange(6), target] = a
    p = (virtual / temperature).softmax(1)
    expected = F.kl_div(student.log_softmax(1), p, reduction="sum") / (6 * classes)
    d = (a - (1 - a) / (classes - 1)) / temperature
    same = exp(d) / (exp(d) + classes - 1)
    result = luce.tfkd_loss(student, target, correct_probability=same, temperature=1.0)
    assert_close(result / classes, expected)


def test_tfkd_is_kd_from_its_virtual_teacher():
    student, _, target = batch(6)
    virtual = torch.full_like(student, log(0.01 / 4))
    virtual[torch.arange(6), target] = log(0.99)
    expected = luce.kd_loss(student, virtual, temperature=20.0)
    assert_close(luce.tfkd_loss(student, target), expected)
    module = luce.TfKDLoss()
    assert not module.takes_teacher
    assert_close(module(student, None, target), expected)
    assert_close(module(student, torch.randn(6, 5), target), expected)


@laws
@given(rows(), TEMPERATURE, st.floats(0.01, 0.99))
def test_tfkd_is_zero_for_the_virtual_teacher_alone(data, temperature, a):
    student, _, target = data
    virtual = torch.full_like(student, log((1 - a) / (student.shape[-1] - 1)))
    virtual[0, target] = log(a)
    options = {"correct_probability": a, "temperature": temperature}
    assert luce.tfkd_loss(virtual + 3, target, **options).item() == pytest.approx(0, abs=1e-12)
    moved = virtual.clone()
    moved[0, 0] += 1
    assert luce.tfkd_loss(moved, target, **options).item() > 1e-8
