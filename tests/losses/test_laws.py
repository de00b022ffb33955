"""What holds for any logits, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

import luce
from luce.ops.kd import forward_kl
from luce.ops.pld import label_first, ranking_nll, teacher_order

from . import formulas

laws = settings(max_examples=25, deadline=None, derandomize=True)

# Logits are multiples of 1/8, so that shifts are exact and teacher's logits are either equal or well apart.
LOGIT = st.integers(-64, 64).map(lambda i: i / 8)
TEMPERATURE = st.sampled_from([0.5, 1.0, 2.0, 4.0])


def tensor(x) -> Tensor:
    return torch.tensor(x, dtype=torch.float64)


@st.composite
def rows(draw, students: int = 1, smallest: int = 2, largest: int = 7):
    """One row: logits of some students, those of a teacher without ties, and a label."""
    classes = draw(st.integers(smallest, largest))
    row = st.lists(LOGIT, min_size=classes, max_size=classes)
    teacher = st.lists(LOGIT, min_size=classes, max_size=classes, unique=True)
    return (
        *(tensor([draw(row)]) for _ in range(students)),
        tensor([draw(teacher)]),
        torch.tensor([draw(st.integers(0, classes - 1))]),
    )


def alpha_of(teacher, target, temperature=1.0):
    """Weights of the places, in ranking order."""
    order = label_first(teacher_order(teacher), target)
    return (teacher / temperature).softmax(-1).gather(-1, order), order


def slope(loss, student, *others, **options):
    student = student.clone().requires_grad_()
    return torch.autograd.grad(loss(student, *others, **options).sum(), student)[0]


# Plackett-Luce Distillation


@laws
@given(rows(), TEMPERATURE, st.sampled_from([None, 1, 2, 4]), st.booleans())
def test_pld_is_its_formula_and_its_gradient_is_the_quadratic_one(data, temperature, top_k, labelled):
    student, teacher, target = data
    s, t, y = student[0].tolist(), teacher[0].tolist(), int(target) if labelled else None
    options = {"teacher_temperature": temperature, "top_k": top_k}
    target = target if labelled else None
    value = luce.pld_loss(student, teacher, target, **options)
    assert value.item() == pytest.approx(formulas.pld(s, t, y, temperature, top_k), rel=1e-12, abs=1e-13)
    expected = formulas.pld_gradient(s, t, y, temperature, top_k)
    assert_close(
        slope(luce.pld_loss, student, teacher, target, **options), tensor([expected]), rtol=1e-9, atol=1e-13
    )


@laws
@given(rows(smallest=1), TEMPERATURE)
def test_pld_is_positive(data, temperature):
    student, teacher, target = data
    value = luce.pld_loss(student, teacher, target, teacher_temperature=temperature)
    assert value == 0 if student.shape[-1] == 1 else value > 0


@laws
@given(rows(), TEMPERATURE)
def test_bounds_of_the_gradient_of_pld(data, temperature):
    student, teacher, target = data
    gradient = slope(luce.pld_loss, student, teacher, target, teacher_temperature=temperature)
    alpha, order = alpha_of(teacher, target, temperature)
    in_order = gradient.gather(-1, order)[0]
    before = alpha.cumsum(-1)[0] - alpha[0]
    assert (in_order >= -alpha[0] - 1e-12).all()
    assert (in_order <= before + 1e-12).all()
    expected = -alpha[0, 0] * (1 - student.softmax(-1)[0, target[0]])  # never above 0
    assert_close(gradient[0, target[0]], expected, rtol=1e-9, atol=1e-13)
    room = 1 - alpha[0, -1] + 1e-12
    assert gradient.abs().sum() <= 2 * room
    assert gradient.norm() <= math.sqrt(2) * room
    assert gradient.abs().max() <= room


@laws
@given(rows(students=2), st.floats(0, 1))
def test_pld_is_convex_in_the_student(data, share):
    one, other, teacher, target = data

    def value(s):
        return luce.pld_loss(s, teacher, target)

    between = share * value(one) + (1 - share) * value(other)
    assert value(share * one + (1 - share) * other) <= between + 1e-12


@laws
@given(rows(students=2), TEMPERATURE)
def test_the_gradient_of_pld_is_lipschitz(data, temperature):
    one, other, teacher, target = data
    assume(not torch.equal(one, other))
    alpha, _ = alpha_of(teacher, target, temperature)
    a, b = (slope(luce.pld_loss, s, teacher, target, teacher_temperature=temperature) for s in (one, other))
    assert (a - b).norm() <= 0.5 * (1 - alpha[0, -1]) * (one - other).norm() + 1e-12


@laws
@given(rows(smallest=3), st.data())
def test_truncated_pld(data, draw):
    student, teacher, target = data
    classes = student.shape[-1]
    k = draw.draw(st.integers(1, classes - 1), label="top_k")
    full, cut = luce.pld_loss(student, teacher, target), luce.pld_loss(student, teacher, target, top_k=k)
    alpha, order = alpha_of(teacher, target)
    outside = alpha[0, k:].sum().item()
    tail = student.gather(-1, order)[0, k:]
    bound = outside * (math.log(classes - k) + (tail.max() - tail.min()).item())
    assert -1e-12 <= (full - cut).item() <= bound + 1e-12
    assert cut <= luce.pld_loss(student, teacher, target, top_k=k + 1) + 1e-12
    if k == classes - 1:
        assert_close(cut, full)

    gradient = slope(luce.pld_loss, student, teacher, target)
    rest = gradient - slope(luce.pld_loss, student, teacher, target, top_k=k)
    assert_close(rest.gather(-1, order)[:, :k], torch.zeros(1, k, dtype=torch.float64), rtol=0, atol=1e-13)
    assert rest.abs().sum() <= 2 * outside + 1e-12
    assert rest.norm() <= math.sqrt(2) * outside + 1e-12
    assert rest.abs().max() <= outside + 1e-12


@laws
@given(rows())
def test_the_first_stage_of_pld_is_weighted_cross_entropy(data):
    student, teacher, target = data
    share = teacher.softmax(-1)[0, target[0]]
    assert_close(
        luce.pld_loss(student, teacher, target, top_k=1), share * luce.cross_entropy_loss(student, target)
    )


@laws
@given(rows())
def test_pld_of_a_teacher_that_is_sure_of_the_label_is_cross_entropy(data):
    student, teacher, target = data
    sure = teacher.scatter(-1, target[:, None], 1e3)
    assert_close(luce.pld_loss(student, sure, target), luce.cross_entropy_loss(student, target))
    assert_close(slope(luce.pld_loss, student, sure, target), slope(luce.cross_entropy_loss, student, target))


@laws
@given(rows())
def test_pld_of_a_cold_teacher_looks_at_its_favourite_alone(data):
    """Cross-entropy where that is the label, else cross-entropy among the classes other than the label."""
    student, teacher, target = data
    favourite = teacher.argmax(-1)
    others = student.clone()
    if favourite != target:
        others[0, target[0]] = -math.inf
    expected = luce.cross_entropy_loss(others, favourite)
    # The runner-up of logits that are multiples of 1/8 is e^-125 behind.
    assert_close(luce.pld_loss(student, teacher, target, teacher_temperature=1e-3), expected)


@laws
@given(rows())
def test_pld_of_a_hot_teacher_is_listmle_shared_out(data):
    student, teacher, target = data
    expected = luce.listmle_loss(student, teacher, target) / student.shape[-1]
    value = luce.pld_loss(student, teacher, target, teacher_temperature=1e12)
    assert_close(value, expected, rtol=1e-9, atol=1e-12)


@laws
@given(rows(smallest=2, largest=2), TEMPERATURE)
def test_pld_of_two_classes_is_weighted_cross_entropy(data, temperature):
    student, teacher, target = data
    share = (teacher / temperature).softmax(-1)[0, target[0]]
    value = luce.pld_loss(student, teacher, target, teacher_temperature=temperature)
    assert_close(value, share * luce.cross_entropy_loss(student, target))


@laws
@given(rows(), LOGIT)
def test_pld_of_an_even_student(data, level):
    student, teacher, target = data
    alpha, _ = alpha_of(teacher, target)
    classes = student.shape[-1]
    expected = sum(a * math.log(classes - k) for k, a in enumerate(alpha[0].tolist()))
    value = luce.pld_loss(torch.full_like(student, level), teacher, target)
    assert value.item() == pytest.approx(expected, rel=1e-12)


@laws
@given(rows(), st.floats(0, 100))
def test_the_last_place_of_a_ranking_is_inert(data, weight):
    student, teacher, target = data
    alpha, order = alpha_of(teacher, target)
    other = alpha.clone()
    other[:, -1] = weight
    u = student.gather(-1, order)
    assert_close(ranking_nll(u, other), ranking_nll(u, alpha), rtol=0, atol=0)


@laws
@given(rows(), st.sampled_from([0.5, 2.0, 3.0]))
def test_the_scale_of_the_teacher_leaves_the_ranking(data, scale):
    student, teacher, target = data
    assert torch.equal(teacher_order(scale * teacher), teacher_order(teacher))
    assert_close(
        luce.listmle_loss(student, scale * teacher, target), luce.listmle_loss(student, teacher, target)
    )
    value = luce.pld_loss(student, scale * teacher, target)
    assert_close(value, luce.pld_loss(student, teacher, target, teacher_temperature=1 / scale))


@laws
@given(rows())
def test_wide_margins_make_pld_vanish(data):
    """No finite student is the best one; the infimum of 0 is approached along the ranking."""
    _, teacher, target = data
    _, order = alpha_of(teacher, target)
    places = torch.arange(teacher.shape[-1], 0, -1, dtype=torch.float64)[None]
    student = torch.zeros_like(teacher).scatter(-1, order, places)
    values = [luce.pld_loss(margin * student, teacher, target).item() for margin in (1, 3, 10, 40)]
    assert values == sorted(values, reverse=True)
    assert values[-1] < 1e-15


# Rankings


@laws
@given(rows())
def test_listmle_and_p_listmle_are_their_formulas(data):
    student, teacher, target = data
    for y in (None, int(target)):
        row = student[0].tolist(), teacher[0].tolist(), y
        label = None if y is None else target
        expected = formulas.listmle(*row)
        assert luce.listmle_loss(student, teacher, label).item() == pytest.approx(expected, rel=1e-12)
        for normalize in (True, False):
            value = luce.p_listmle_loss(student, teacher, label, normalize=normalize)
            assert value.item() == pytest.approx(formulas.p_listmle(*row, normalize=normalize), rel=1e-12)


@laws
@given(rows(), st.data())
def test_a_better_class_moved_forward_makes_a_ranking_likelier(data, draw):
    student, teacher, _ = data
    order = teacher_order(teacher)
    k = draw.draw(st.integers(0, student.shape[-1] - 2), label="place")
    ranked = student.gather(-1, order)
    assume(ranked[0, k] != ranked[0, k + 1])
    swapped = teacher.clone()
    swapped[0, order[0, k]], swapped[0, order[0, k + 1]] = (
        teacher[0, order[0, k + 1]],
        teacher[0, order[0, k]],
    )
    cheaper = luce.listmle_loss(student, swapped) < luce.listmle_loss(student, teacher)
    assert bool(cheaper) is bool(ranked[0, k + 1] > ranked[0, k])


@laws
@given(st.integers(2, 5), st.data())
def test_the_rankings_of_a_student_have_probabilities_that_sum_to_one(classes, draw):
    student = tensor([draw.draw(st.lists(LOGIT, min_size=classes, max_size=classes))])
    ranks = torch.cartesian_prod(*[torch.arange(classes)] * classes)
    teachers = ranks[[len(set(r)) == classes for r in ranks.tolist()]].double()
    nll = luce.listmle_loss(student.expand(len(teachers), -1), teachers, reduction="none")
    assert torch.exp(-nll).sum().item() == pytest.approx(1, rel=1e-12)


# Divergences


@laws
@given(rows(), TEMPERATURE, st.booleans())
def test_divergences_are_their_formulas(data, temperature, scale):
    student, teacher, target = data
    s, t, y = student[0].tolist(), teacher[0].tolist(), int(target)
    options = {"temperature": temperature, "scale_by_temperature": scale}
    factor = 1 if scale else temperature**-2
    # A KL is a small difference of large terms where the networks nearly agree.
    close = {"rel": 1e-9, "abs": 1e-12}
    for value, expected in (
        (luce.kd_loss(student, teacher, **options), formulas.kd(s, t, temperature)),
        (luce.reverse_kl_loss(student, teacher, **options), formulas.kd(t, s, temperature)),
        (luce.jsd_loss(student, teacher, beta=0.3, **options), formulas.jsd(s, t, 0.3, temperature)),
        (luce.dkd_loss(student, teacher, target, **options), formulas.dkd(s, t, y, 1.0, 8.0, temperature)),
    ):
        assert value.item() == pytest.approx(factor * expected, **close)


@laws
@given(rows(), TEMPERATURE)
def test_kd_is_target_and_rest_of_dkd(data, temperature):
    """KL(p || q) = TCKD + (1 - p_y) NCKD."""
    student, teacher, target = data
    options = {"temperature": temperature}
    of_target = luce.dkd_loss(student, teacher, target, alpha=1.0, beta=0.0, **options)
    of_rest = luce.dkd_loss(student, teacher, target, alpha=0.0, beta=1.0, **options)
    rest = 1 - (teacher / temperature).softmax(-1)[0, target[0]]
    assert_close(of_target + rest * of_rest, luce.kd_loss(student, teacher, **options), rtol=1e-9, atol=1e-10)


@laws
@given(rows(), TEMPERATURE)
def test_the_gradient_of_dkd(data, temperature):
    student, teacher, target = data
    y, alpha, beta = int(target), 0.7, 3.0
    q, p = (student / temperature).softmax(-1)[0], (teacher / temperature).softmax(-1)[0]
    rest = torch.arange(len(q)) != y
    q_rest = (student / temperature)[0, rest].softmax(-1)
    p_rest = (teacher / temperature)[0, rest].softmax(-1)
    expected = torch.empty_like(q)
    expected[y] = alpha * (q[y] - p[y])
    expected[rest] = -alpha * (q[y] - p[y]) * q_rest + beta * (q_rest - p_rest)
    gradient = slope(luce.dkd_loss, student, teacher, target, alpha=alpha, beta=beta, temperature=temperature)
    assert_close(gradient[0], temperature * expected, rtol=1e-9, atol=1e-12)


@laws
@given(rows(), TEMPERATURE)
def test_the_gradient_of_kd(data, temperature):
    student, teacher, _ = data
    q, p = (student / temperature).softmax(-1), (teacher / temperature).softmax(-1)
    gradient = slope(luce.kd_loss, student, teacher, temperature=temperature)
    assert_close(gradient, temperature * (q - p), rtol=1e-9, atol=1e-13)


@laws
@given(rows())
def test_kd_is_logit_matching_without_the_common_offset_at_a_high_temperature(data):
    student, teacher, _ = data
    limit = formulas.logit_matching_limit(student[0].tolist(), teacher[0].tolist())
    difference = student - teacher
    spread = difference - difference.mean()
    assert limit == pytest.approx(luce.logit_matching_loss(spread, 0 * spread).item() / 2, abs=1e-12)
    temperature = 1e5
    # What is left out falls as 1 / T: the third moments, of numbers up to 16.
    value = luce.kd_loss(student, teacher, temperature=temperature).item()
    assert value == pytest.approx(limit, abs=16**3 / temperature)
    gradient = slope(luce.kd_loss, student, teacher, temperature=temperature)
    assert_close(gradient, spread / student.shape[-1], rtol=0, atol=16**2 / temperature)


@laws
@given(rows(), TEMPERATURE)
def test_reverse_kl_is_kd_with_the_networks_exchanged(data, temperature):
    student, teacher, _ = data
    value = luce.reverse_kl_loss(student, teacher, temperature=temperature)
    assert_close(value, luce.kd_loss(teacher, student, temperature=temperature), rtol=0, atol=0)


@laws
@given(rows(), st.floats(0.05, 0.95), TEMPERATURE)
def test_jsd_is_symmetric_and_bounded(data, beta, temperature):
    student, teacher, _ = data
    options = {"temperature": temperature, "scale_by_temperature": False}
    value = luce.jsd_loss(student, teacher, beta=beta, **options)
    exchanged = luce.jsd_loss(teacher, student, beta=1 - beta, **options)
    assert_close(value, exchanged, rtol=1e-9, atol=1e-14)
    entropy = -beta * math.log(beta) - (1 - beta) * math.log(1 - beta)  # log 2 at a half
    assert -1e-14 <= value.item() <= entropy + 1e-12
    half = luce.jsd_loss(student, teacher, **options)
    assert_close(half, luce.jsd_loss(teacher, student, **options))
    assert half <= math.log(2) + 1e-14


@laws
@given(rows())
def test_jsd_tends_to_the_two_kl_divergences(data):
    student, teacher, _ = data
    student, teacher = student / 4, teacher / 4  # probabilities that a small beta does not drown
    small = 1e-6
    forward = luce.jsd_loss(student, teacher, beta=small) / small
    assert_close(forward, luce.kd_loss(student, teacher), rtol=1e-3, atol=1e-6)
    reverse = luce.jsd_loss(student, teacher, beta=1 - small) / small
    assert_close(reverse, luce.reverse_kl_loss(student, teacher), rtol=1e-3, atol=1e-6)


@laws
@given(rows(), TEMPERATURE)
def test_listnet_is_kd_plus_the_entropy_of_the_teacher(data, temperature):
    student, teacher, _ = data
    p = (teacher / temperature).softmax(-1)
    kl = forward_kl(student, teacher, temperature)[0]
    value = luce.listnet_loss(student, teacher, temperature=temperature)
    assert_close(value, kl - (p * p.log()).sum(), rtol=1e-9, atol=1e-12)


# DIST


@laws
@given(st.integers(3, 6), st.integers(3, 6), st.integers(0, 1000))
def test_dist(rows, classes, seed):
    """Both terms from 0 to 2, and made of correlations."""
    random = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn(2, rows, classes, generator=random, dtype=torch.float64)
    terms = [
        luce.dist_loss(student, teacher, beta=beta, gamma=1 - beta, temperature=1.0).item()
        for beta in (1.0, 0.0)
    ]
    expected = formulas.dist_terms(student.tolist(), teacher.tolist(), 1.0)
    assert terms == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert all(-1e-12 <= term <= 2 + 1e-12 for term in terms)
    q = (student / 2).softmax(-1)
    affine = (0.3 * q + 0.7 / classes).log()  # softmax of this is an affine map of the row's probabilities
    within = luce.dist_loss(student, affine, beta=1.0, gamma=0.0, temperature=1.0)
    same = luce.dist_loss(student, q.log(), beta=1.0, gamma=0.0, temperature=1.0)
    assert_close(within, same, rtol=0, atol=1e-5)


def test_dist_of_equal_networks_is_zero():
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(16, 5, generator=random, dtype=torch.float64)
    assert luce.dist_loss(logits, logits, temperature=1.0).item() == pytest.approx(0, abs=1e-12)


@given(rows())
def test_hard_labels_are_kd_from_a_certain_teacher_and_cross_entropy_with_its_choice(data):
    student, teacher, target = data
    choice = teacher.argmax(-1)
    values = luce.hard_label_loss(student, teacher, target, reduction="none")
    assert_close(values, luce.cross_entropy_loss(student, choice, reduction="none"))
    certain = torch.full_like(teacher, -1000.0).scatter(1, choice[:, None], 0.0)
    assert_close(values, luce.kd_loss(student, certain, reduction="none"))
    assert_close(values, luce.hard_label_loss(student, 2 * teacher, reduction="none"))
