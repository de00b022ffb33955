"""RKKD and the ranking losses of pairs, beyond the battery: values, limits, options, memory."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

import luce
from luce.losses import standardize
from luce.ops import _pairs
from luce.ops.engines import WHY_NOT
from luce.ops.rkkd import FORMS

from .catalogue import batch

inf, nan = math.inf, math.nan
T = [2.0, 0.5, -1.0, 0.3]
S = [1.2, 0.7, -0.4, 0.9]

laws = settings(max_examples=25, deadline=None, derandomize=True)
every_form = pytest.mark.parametrize("form", FORMS)
LOGIT = st.integers(-64, 64).map(lambda i: i / 8)


def tensor(x):
    return torch.tensor(x, dtype=torch.float64)


def value_and_gradient(loss, student, teacher, **options):
    student = student.detach().clone().requires_grad_()
    value = loss(student, teacher, **options)
    return value.detach(), torch.autograd.grad(value.sum(), student)[0]


@st.composite
def two_rows(draw, smallest=2):
    """A student and a teacher, which may have ties."""
    classes = draw(st.integers(smallest, 7))
    row = st.lists(LOGIT, min_size=classes, max_size=classes)
    return draw(row), draw(row)


# RKKD


@pytest.mark.parametrize(
    ("form", "k", "loss", "gradient"),  # the figures of an independent computation, to six places
    [
        ("tanh", 1.0, 0.493988, [-0.286277, 0.032839, 0.116125, 0.137313]),
        ("tanh", 2.0, 0.317486, [-0.378172, 0.015037, 0.025299, 0.337836]),
        ("tanh", 10.0, 0.322398, [-0.016746, -0.113213, 0.000000, 0.129959]),
        ("sign_tanh", 1.0, 0.476676, [-0.308685, -0.088966, 0.127860, 0.269791]),
        ("sign_tanh", 2.0, 0.353309, [-0.379392, -0.161197, 0.025458, 0.515131]),
        ("product", 1.0, 0.345336, [-0.370041, 0.081561, 0.062038, 0.226443]),
        ("product", 2.0, 0.234975, [-0.321160, 0.021398, 0.004718, 0.295044]),
        ("sigmoid", 1.0, 0.750953, [-0.148236, 0.001862, 0.113909, 0.032465]),
        ("sigmoid", 2.0, 0.493988, [-0.286277, 0.032839, 0.116125, 0.137313]),
        ("clip", 1.0, 0.4, [-2 / 6, 0.0, 0.0, 2 / 6]),
        ("clip", 1.5, 0.35, [-3 / 6, 0.0, 0.0, 3 / 6]),
    ],
)
def test_golden_values_of_rkkd(form, k, loss, gradient):
    value, slope = value_and_gradient(luce.rkkd_loss, tensor([S]), tensor([T]), form=form, steepness=k)
    assert value.item() == pytest.approx(loss, abs=6e-7)
    assert_close(slope, tensor([gradient]), rtol=0, atol=6e-7)


@laws
@given(two_rows(), st.sampled_from(FORMS), st.sampled_from([0.3, 1.0, 5.0]))
def test_laws_of_rkkd(data, form, k):
    """The range, the reverse, the exchange of the networks, and the bound of the gradient."""
    student, teacher = (tensor([row]) for row in data)
    options = {"form": form, "steepness": k}
    value, gradient = value_and_gradient(luce.rkkd_loss, student, teacher, **options)
    assert -1e-12 <= value <= 2 + 1e-12
    assert_close(luce.rkkd_loss(-student, teacher, **options), 2 - value, rtol=1e-9, atol=1e-12)
    assert abs(gradient.sum().item()) <= 1e-12
    if form in ("tanh", "product", "sigmoid"):
        assert_close(luce.rkkd_loss(teacher, student, **options), value, rtol=1e-9, atol=1e-12)
    if form != "product":
        assert gradient.abs().max() <= 2 * k / student.shape[-1] + 1e-12


def tau_a(a, b):
    """Concordant less discordant pairs, by counting."""
    pairs = list(itertools.combinations(range(len(a)), 2))
    return sum(np.sign(a[i] - a[j]) * np.sign(b[i] - b[j]) for i, j in pairs) / len(pairs)


@laws
@given(two_rows(), st.sampled_from(FORMS))
def test_steep_rkkd_is_one_minus_kendalls_tau(data, form):
    student, teacher = data
    value = luce.rkkd_loss(tensor([student]), tensor([teacher]), form=form, steepness=1e6).item()
    assert value == pytest.approx(1 - tau_a(student, teacher), abs=1e-12)


def test_the_least_value_of_rkkd_is_not_at_the_teacher():
    teacher = tensor([T])
    distances = [abs(a - b) for a, b in itertools.combinations(T, 2)]
    equal = 1 - sum(math.tanh(d) ** 2 for d in distances) / 6
    least = 1 - sum(math.tanh(d) for d in distances) / 6
    assert equal == pytest.approx(0.285794, abs=6e-7)
    assert least == pytest.approx(0.200024, abs=6e-7)
    assert luce.rkkd_loss(teacher, teacher).item() == pytest.approx(equal)
    assert luce.rkkd_loss(100 * teacher, teacher).item() == pytest.approx(least)


def test_standardized_rkkd_needs_no_unit():
    """The z-scores leave the gradient no part along the logits: their size is up to other losses."""
    student, teacher, _ = batch(4, classes=9)
    loss = luce.Standardized(luce.RKKDLoss(steepness=2.0))
    value, gradient = value_and_gradient(loss, student, teacher)
    expected = luce.rkkd_loss(standardize(student), standardize(teacher), steepness=2.0)
    assert_close(value, expected)
    assert_close(loss(7 * student - 3, teacher / 5 + 1), value)
    assert_close((gradient * student).sum(-1), torch.zeros(4, dtype=torch.float64), rtol=0, atol=1e-14)


@every_form
@pytest.mark.parametrize("end", ["top", "bottom"])
def test_ends_of_the_teachers_order(form, end):
    """The same as the loss on these classes alone."""
    student, teacher, _ = batch(4, 3, classes=20)
    order = teacher.argsort(-1, descending=end == "top")[..., :4]
    expected, small = value_and_gradient(
        luce.rkkd_loss, student.gather(-1, order), teacher.gather(-1, order), form=form, class_dim=-1
    )
    for share in (4, 0.2, 0.21):
        options = {"form": form, "channels": end, "share": share, "class_dim": -1}
        value, gradient = value_and_gradient(luce.rkkd_loss, student, teacher, **options)
        assert_close(value, expected)
        assert_close(gradient, torch.zeros_like(student).scatter(-1, order, small))


@pytest.mark.parametrize(
    ("classes", "share", "expected"),
    [
        (100, 0.1, 10),
        (30, 0.1, 3),
        (14, 0.1, 2),
        (16, 0.1, 2),
        (26, 0.1, 3),
        (10, 0.1, 2),
        (2, 0.1, 2),
        (7, 1.0, 7),
        (7, 3, 3),
        (7, 50, 7),
        (5, 0.5, 2),
    ],
)
@pytest.mark.parametrize("end", ["top", "bottom"])
def test_how_many_classes_a_share_is(classes, share, expected, end):
    student, teacher = torch.randn(2, 1, classes)
    options = {"channels": end, "share": share, "steepness": 0.1}
    _, gradient = value_and_gradient(luce.rkkd_loss, student, teacher, **options)
    assert (gradient != 0).sum() == expected
    ranked = teacher.argsort(-1, descending=end == "top")[:, :expected]
    assert (gradient.gather(-1, ranked) != 0).all()


def test_the_share_is_of_the_classes_that_exist():
    student, teacher, _ = batch(2, classes=10)
    student[0, :6] = teacher[0, :6] = -inf
    teacher[1, 3] = -inf  # the teacher's last one, and it exists
    for end in ("top", "bottom"):
        options = {"channels": end, "share": 0.5, "steepness": 0.1}
        _, gradient = value_and_gradient(luce.rkkd_loss, student, teacher, **options)
        assert (gradient != 0).sum(-1).tolist() == [2, 5]
    assert gradient[1, 3] != 0


@pytest.mark.parametrize("options", [{}, {"channels": "top"}, {"channels": "bottom"}])
def test_a_single_class_has_no_pair(options):
    student, teacher, _ = batch(3, classes=1)
    value, gradient = value_and_gradient(luce.rkkd_loss, student, teacher, reduction="none", **options)
    assert value.tolist() == [0, 0, 0]
    assert (gradient == 0).all()


def test_rkkd_as_an_addition():
    student, teacher, target = batch(8)
    parts = {"kd": (0.9, luce.KDLoss(temperature=4.0)), "rank": (0.5, luce.RKKDLoss(steepness=2.0))}
    student.requires_grad_()
    terms = luce.WeightedSum(parts)(student, teacher, target)
    assert_close(terms["rank"], 0.5 * luce.rkkd_loss(student, teacher, steepness=2.0))
    for name in parts:
        (gradient,) = torch.autograd.grad(terms[name], student, retain_graph=True)
        assert gradient.abs().max() > 1e-3


# Ranking


def ordered_pairs(student, teacher, cost):
    """By hand, pair by pair."""
    pairs = [(i, j) for i, j in itertools.permutations(range(len(teacher)), 2) if teacher[i] > teacher[j]]
    return math.fsum(cost(student[i] - student[j]) for i, j in pairs) / max(1, len(pairs))


def test_ranking_losses_spelled_out():
    """Of six pairs the student has one the wrong way round: class 3 before class 1, by 0.2."""
    leads = [0.5, 1.6, 0.3, 1.1, -0.2, 1.3]
    expected = (0.5 + 0 + 0.7 + 0 + 1.2 + 0) / 6
    assert luce.ranking_hinge_loss(tensor([S]), tensor([T])).item() == pytest.approx(expected, rel=1e-12)
    expected = (1.5 + 0.4 + 1.7 + 0.9 + 2.2 + 0.7) / 6
    assert luce.ranking_hinge_loss(tensor([S]), tensor([T]), margin=2.0).item() == pytest.approx(expected)
    for k in (1.0, 3.0):
        expected = sum(math.log(1 + math.exp(-k * lead)) for lead in leads) / 6
        value = luce.ranking_logistic_loss(tensor([S]), tensor([T]), steepness=k).item()
        assert value == pytest.approx(expected, rel=1e-12)


def test_gradients_of_the_ranking_losses():
    # Below their margin are the pairs 0 before 1, 0 before 3 and 1 before 3.
    _, gradient = value_and_gradient(luce.ranking_hinge_loss, tensor([S]), tensor([T]))
    assert_close(gradient, tensor([[-2 / 6, 0.0, 0.0, 2 / 6]]))
    _, gradient = value_and_gradient(luce.ranking_logistic_loss, tensor([S]), tensor([T]), steepness=2.0)
    expected = [
        sum(-2 / (1 + math.exp(2 * (S[i] - S[j]))) for j in range(4) if T[i] > T[j])
        + sum(2 / (1 + math.exp(2 * (S[j] - S[i]))) for j in range(4) if T[j] > T[i])
        for i in range(4)
    ]
    assert_close(gradient, tensor([expected]) / 6)


@laws
@given(two_rows(smallest=1), st.sampled_from([0.25, 1.0, 10.0]))
def test_ranking_losses_are_their_formulas(data, size):
    """Also with ties, which are not compared."""
    student, teacher = data
    rows = tensor([student]), tensor([teacher])
    hinge = ordered_pairs(student, teacher, lambda lead: max(0.0, size - lead))
    assert luce.ranking_hinge_loss(*rows, margin=size).item() == pytest.approx(hinge, rel=1e-12)
    logistic = ordered_pairs(student, teacher, lambda lead: np.logaddexp(0, -size * lead))
    value = luce.ranking_logistic_loss(*rows, steepness=size).item()
    assert value == pytest.approx(logistic, rel=1e-12, abs=1e-15)


@pytest.mark.parametrize("loss", [luce.ranking_hinge_loss, luce.ranking_logistic_loss])
def test_only_the_order_of_the_teacher_counts(loss):
    student, teacher, _ = batch(4)
    assert_close(loss(student, teacher**3), loss(student, teacher), rtol=0, atol=0)
    tied = torch.ones_like(teacher)
    value, gradient = value_and_gradient(loss, student, tied, reduction="none")
    assert (value == 0).all()
    assert (gradient == 0).all()


@laws
@given(two_rows(), st.lists(LOGIT, min_size=7, max_size=7), st.floats(0, 1))
def test_ranking_losses_are_convex_in_the_student(data, other, share):
    student, teacher = (tensor([row]) for row in data)
    other = tensor([other])[:, : student.shape[-1]]
    for loss in (luce.ranking_hinge_loss, luce.ranking_logistic_loss):
        between = share * loss(student, teacher) + (1 - share) * loss(other, teacher)
        assert loss(share * student + (1 - share) * other, teacher) <= between + 1e-12


def test_ranking_logistic_of_two_classes_is_cross_entropy_with_the_teachers_choice():
    student, teacher, _ = batch(6, classes=2)
    expected = luce.cross_entropy_loss(student, teacher.argmax(-1))
    assert_close(luce.ranking_logistic_loss(student, teacher), expected)


def test_ranking_hinge_is_zero_once_all_pairs_have_their_margin():
    teacher = tensor([T])
    gap = 0.2  # between classes 1 and 3
    assert luce.ranking_hinge_loss(1.001 / gap * teacher, teacher) == 0
    assert luce.ranking_hinge_loss(0.999 / gap * teacher, teacher) > 0


@pytest.mark.parametrize("loss", [luce.ranking_hinge_loss, luce.ranking_logistic_loss])
def test_excluded_classes_in_a_ranking(loss):
    """At -inf in the student the class loses all its pairs: +inf where it should win one, else nothing."""
    student, teacher = tensor([[0.3, -inf, 0.1]]), tensor([[1.0, 0.0, 2.0]])
    value, gradient = value_and_gradient(loss, student, teacher)
    expected, expected_gradient = value_and_gradient(loss, student[:, [0, 2]], teacher[:, [0, 2]])
    assert_close(value, expected / 3)
    assert_close(gradient[:, [0, 2]], expected_gradient / 3)
    assert loss(student, teacher[:, [2, 0, 1]]) == inf
    lowest = teacher.clone()
    teacher[0, 1], lowest[0, 1] = -inf, -50.0
    student[0, 1] = 0.2
    assert_close(loss(student, teacher), loss(student, lowest))


# Memory


LOSSES = (luce.rkkd_loss, luce.ranking_hinge_loss, luce.ranking_logistic_loss)


@pytest.mark.parametrize("loss", LOSSES[1:])
@pytest.mark.parametrize("pairs", [1, 2 * 10 * 3, 2 * 10 * 4])
def test_blocks_of_pairs_change_nothing(loss, pairs, monkeypatch):
    student, teacher, _ = batch(2, classes=10)
    student[1, 3] = teacher[1, 3] = -inf
    expected = value_and_gradient(loss, student, teacher)
    monkeypatch.setattr(_pairs, "PAIRS", pairs)
    value = value_and_gradient(loss, student, teacher)
    assert_close(value, expected, rtol=1e-13, atol=1e-15)
    torch.autograd.gradgradcheck(lambda s: loss(s, teacher[:1]), student[:1].requires_grad_())


class LargestTensor(TorchDispatchMode):
    """Notes the size of the largest result of any operation."""

    size = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for made in torch.utils._pytree.tree_leaves(result):
            if isinstance(made, torch.Tensor):
                self.size = max(self.size, made.untyped_storage().nbytes() // made.element_size())
        return result


@pytest.mark.parametrize("loss", LOSSES)
def test_no_array_of_all_pairs(loss):
    """These rows have nine million pairs each, more than four times a block."""
    student, teacher = torch.randn(2, 1, 3000)
    with LargestTensor() as largest:
        _, gradient = value_and_gradient(loss, student, teacher)
    assert largest.size <= 1.1 * _pairs.PAIRS
    assert gradient.isfinite().all()


GROWTH = """
import resource, torch, luce
from luce.ops import _pairs

def held():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10

_pairs.PAIRS = 2**18
student, teacher = torch.randn(2, 1, 4000)
luce.ranking_logistic_loss(student[:, :100].requires_grad_(), teacher[:, :100]).backward()
before = held()
luce.ranking_logistic_loss(student.requires_grad_(), teacher).backward()
print(held() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere `ru_maxrss` has another unit or is not there")
def test_the_process_does_not_grow_as_if_it_held_all_pairs():
    """All pairs would be 122 MiB; small results kept among the blocks made it twice that."""
    answer = subprocess.run([sys.executable, "-c", GROWTH], capture_output=True, text=True, check=True)
    assert float(answer.stdout) < 122


@pytest.mark.parametrize(
    "options",
    [
        {"channels": "top", "share": 100},
        {"channels": "bottom", "share": 0.001},
        pytest.param(
            {"form": "clip"}, marks=pytest.mark.skipif(WHY_NOT is not None, reason=f"native only: {WHY_NOT}")
        ),
    ],
    ids=str,
)
def test_a_hundred_thousand_classes(options):
    """All pairs of one row would take 40 GB."""
    student, teacher = torch.randn(2, 4, 100_000)
    with LargestTensor() as largest:
        value, gradient = value_and_gradient(luce.rkkd_loss, student, teacher, **options)
    assert largest.size <= 2 * student.numel()
    assert 0.5 < value < 1.5
    assert gradient.abs().sum() > 0
