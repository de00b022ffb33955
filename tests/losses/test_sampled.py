"""RankDistil: its expectation by enumeration, its estimate by drawing."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import pytest
import scipy.stats
import torch
from torch.testing import assert_close

import luce
from luce.losses.functional.sampled import _draws

from . import formulas
from .catalogue import batch

inf = math.inf
T = [1.5, -0.2, 0.4, 0.9]
S = [0.5, -1.0, 2.0, 0.3]
RANKINGS = list(itertools.permutations(range(4)))


def tensor(x):
    return torch.tensor(x, dtype=torch.float64)


def probability(scores, ranking):
    return math.exp(-math.fsum(formulas.stage_costs(scores, ranking)))


def expectation(s, t, top_k=4, temperature=1.0):
    """Over all rankings, each as likely as the teacher's model says."""
    s, t = ([x / temperature for x in row] for row in (s, t))
    return math.fsum(probability(t, r) * math.fsum(formulas.stage_costs(s, r)[:top_k]) for r in RANKINGS)


def estimates(s, t, draws, **options):
    """One ranking per row, in many equal rows: value and gradient of each."""
    student = tensor([s]).repeat(draws, 1).requires_grad_()
    teacher = tensor([t]).repeat(draws, 1)
    values = luce.rankdistil_loss(student, teacher, sample_size=1, reduction="none", **options)
    (gradient,) = torch.autograd.grad(values.sum(), student)
    return values.detach(), gradient


def assert_mean(samples, expected):
    """Within four standard errors, in every column."""
    error = samples.std(0) / len(samples) ** 0.5
    assert ((samples.mean(0) - expected).abs() <= 4 * error + 1e-12).all()


def test_rankings_are_drawn_from_the_plackett_luce_model():
    order = sorted(range(4), key=lambda i: -T[i])
    ranked = tensor([[T[i] for i in order]]).repeat(20_000, 1)
    drawn = Counter(tuple(order[i] for i in row) for row in _draws(ranked, 1, None)[:, 0].tolist())
    expected = [20_000 * probability(T, r) for r in RANKINGS]
    assert sum(expected) == pytest.approx(20_000)
    assert scipy.stats.chisquare([drawn[r] for r in RANKINGS], expected).pvalue > 1e-3


@pytest.mark.parametrize("top_k", [1, 2, 3, None])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_estimate_has_the_expectation_as_its_mean(top_k, temperature):
    values, _ = estimates(S, T, 4000, top_k=top_k, temperature=temperature)
    assert_mean(values, expectation(S, T, top_k or 4, temperature))


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_the_expectation_is_least_at_the_teachers_logits(top_k):
    """Its gradient is 0 there, and positive on every way out."""
    least = expectation(T, T, top_k)
    for direction in ([1, 0, 0, 0], [0, -1, 0, 0], [1, 1, -1, -1], [0.3, -0.2, 0.5, 0.1]):
        near, far = ([t + step * d for t, d in zip(T, direction, strict=True)] for step in (1e-4, 0.5))
        assert 0 <= expectation(near, T, top_k) - least < 1e-7
        assert expectation(far, T, top_k) > least + 1e-3
    assert expectation([t + 3 for t in T], T, top_k) == pytest.approx(least)


@pytest.mark.parametrize("top_k", [1, 2, None])
def test_the_gradient_vanishes_on_average_at_the_teachers_logits(top_k):
    _, gradient = estimates([t - 0.7 for t in T], T, 4000, top_k=top_k)
    assert gradient.abs().mean() > 0.1
    assert_mean(gradient, torch.zeros(4, dtype=torch.float64))
    _, elsewhere = estimates(S, T, 4000, top_k=top_k)
    assert (elsewhere.mean(0).abs() > 10 * elsewhere.std(0) / 4000**0.5).any()


def test_the_first_place_alone_is_listnet_on_average():
    values, _ = estimates(S, T, 4000, top_k=1)
    assert_mean(values, luce.listnet_loss(tensor([S]), tensor([T])).item())


@pytest.mark.parametrize("top_k", [1, 2, None])
def test_a_teacher_without_doubt_leaves_its_own_order(top_k):
    student, teacher, _ = batch(3)
    sure = 1e4 * teacher
    expected = [
        formulas.ranking_cost(s, formulas.ranking(t), [1.0] * (top_k or 5))
        for s, t in zip(student.tolist(), teacher.tolist(), strict=True)
    ]
    value = luce.rankdistil_loss(student, sure, top_k=top_k, reduction="none")
    assert_close(value, tensor(expected))
    if top_k is None:
        assert_close(value, luce.listmle_loss(student, teacher, reduction="none"))


def test_an_even_student_finds_all_rankings_alike():
    for k in (1, 3, 4):
        expected = sum(math.log(4 - i) for i in range(k))
        value = luce.rankdistil_loss(torch.zeros(2, 4), torch.randn(2, 4), top_k=k).item()
        assert value == pytest.approx(expected, rel=1e-6)


def test_more_rankings_make_a_smaller_error():
    """Of 16 rankings each, the variance should be a sixteenth."""
    one, _ = estimates(S, T, 4000)
    many = luce.rankdistil_loss(
        tensor([S]).repeat(4000, 1), tensor([T]).repeat(4000, 1), sample_size=16, reduction="none"
    )
    assert one.var() / many.var() == pytest.approx(16, rel=0.2)


def test_what_is_drawn_can_be_repeated():
    student, teacher, _ = batch(4)
    torch.manual_seed(5)
    first = luce.rankdistil_loss(student, teacher, reduction="none")
    assert (luce.rankdistil_loss(student, teacher, reduction="none") != first).all()
    torch.manual_seed(5)
    assert_close(luce.rankdistil_loss(student, teacher, reduction="none"), first, rtol=0, atol=0)

    state = torch.get_rng_state()
    fixed = [luce.rankdistil_loss(student, teacher, seed=seed) for seed in (3, 3, 4)]
    assert fixed[0] == fixed[1] != fixed[2]
    assert torch.equal(torch.get_rng_state(), state)
    module = luce.RankDistilLoss(seed=3)
    assert module(student, teacher) == module(student, teacher) == fixed[0]


def test_rows_draw_for_themselves():
    student, teacher, _ = batch(1)
    rows = student.repeat(8, 1), teacher.repeat(8, 1)
    assert len(set(luce.rankdistil_loss(*rows, reduction="none").tolist())) == 8
    assert len(set(luce.rankdistil_loss(*rows, reduction="none", seed=0).tolist())) == 1


def test_a_class_that_the_teacher_excludes_is_never_drawn():
    """But it stays an alternative: with two more of them, ln(1/3) for two classes becomes ln of more."""
    student, teacher = torch.zeros(1, 4), torch.tensor([[0.0, -inf, 0.0, -inf]])
    assert luce.rankdistil_loss(student, teacher).item() == pytest.approx(math.log(4 * 3), rel=1e-6)
    assert luce.rankdistil_loss(student, teacher, top_k=1).item() == pytest.approx(math.log(4), rel=1e-6)
    student[0, 1] = -inf
    assert luce.rankdistil_loss(student, teacher).item() == pytest.approx(math.log(3 * 2), rel=1e-6)


@pytest.mark.parametrize("bad", [math.nan, inf])
def test_undefined_teachers_are_not_hidden_by_the_sort(bad):
    student, teacher, _ = batch(3)
    teacher[1, 2] = bad
    assert luce.rankdistil_loss(student, teacher, reduction="none").isnan().tolist() == [False, True, False]
    teacher[1] = -inf
    assert luce.rankdistil_loss(student, teacher, reduction="none").isnan().tolist() == [False, True, False]


def test_memory_grows_with_the_rankings_and_not_with_the_square_of_the_classes():
    student, teacher = torch.randn(2, 1, 50_000)
    value = luce.rankdistil_loss(student.requires_grad_(), teacher, sample_size=2)
    (gradient,) = torch.autograd.grad(value, student)
    assert value.isfinite()
    assert gradient.isfinite().all()


def test_compiled_with_and_without_a_seed():
    for options in ({"seed": 3}, {}):
        function = torch.compile(luce.RankDistilLoss(**options), fullgraph=True, backend="aot_eager")
        for rows, classes in ((4, 6), (5, 9)):
            student, teacher = torch.randn(2, rows, classes)
            torch.manual_seed(0)
            value = function(student, teacher)
            torch.manual_seed(0)
            assert_close(value, luce.rankdistil_loss(student, teacher, **options))
