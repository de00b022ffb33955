"""Values worked out by hand: the formula in Python floats, and the figures that the papers' examples give."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

import luce
from luce.losses import partial_target

from . import catalogue, formulas
from .catalogue import LOSSES

S = [[0.5, -1.0, 2.0, 0.3], [1.2, 0.1, -0.7, 0.4]]
T = [[2.0, 1.0, 0.1, -1.0], [0.2, 2.5, -0.3, 0.9]]
Y = [2, 1]
S3, T3 = [*S, [-0.3, 0.8, 0.2, -1.1]], [*T, [0.5, 1.4, -0.2, -0.9]]
exp, log = math.exp, math.log


def tensor(x, **options):
    return torch.tensor(x, dtype=torch.float64, **options)


def value(loss, s, t, y=None, **options):
    """The loss of one row or a batch of Python floats, as a float."""
    y = None if y is None else torch.tensor(y)
    return loss(tensor(s), tensor(t), y, **options).item()


def gradient(loss, s, t, y=None, **options):
    s = tensor(s, requires_grad=True)
    loss(s, tensor(t), None if y is None else torch.tensor(y), **options).backward()
    return s.grad.tolist()


def digits(x, places=6):
    """Equal to that many decimal places."""
    return pytest.approx(x, rel=0, abs=0.51 * 10.0**-places)


def mean(per_row, *rows):
    return sum(per_row(*row) for row in zip(*rows, strict=True)) / len(rows[0])


def table(expected, places=6):
    return [digits(row, places) for row in expected]


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.name)
def test_the_example_of_the_catalogue(loss):
    golden = loss.golden
    logits = (golden.student, catalogue.T) if loss.module.takes_teacher else (golden.student,)
    result = loss.function(*map(tensor, ([x] for x in logits)), torch.tensor([0]), **golden.options)
    assert result.item() == pytest.approx(golden.value, rel=1e-12)


# Plackett-Luce Distillation. Example A: the teacher prefers class 0, the label is class 2.

s, t, y = S[0], T[0], 2


def test_pld_spelled_out():
    """Ranking 2, 0, 1, 3: the label, then the teacher's order."""
    z = exp(2.0) + exp(1.0) + exp(0.1) + exp(-1.0)
    expected = (
        exp(0.1) / z * log((exp(2.0) + exp(0.5) + exp(-1.0) + exp(0.3)) / exp(2.0))
        + exp(2.0) / z * log((exp(0.5) + exp(-1.0) + exp(0.3)) / exp(0.5))
        + exp(1.0) / z * log((exp(-1.0) + exp(0.3)) / exp(-1.0))
    )
    assert value(luce.pld_loss, s, t, y) == pytest.approx(expected, rel=1e-12)
    assert expected == digits(0.8530422563, 10)


def test_pld_stage_by_stage():
    order = formulas.ranking(t, y)
    assert order == [2, 0, 1, 3]
    weights = formulas.pld_weights(t, order)
    assert weights == digits([0.095435, 0.638066, 0.234731, 0.031767])
    assert formulas.stage_costs(s, order) == digits([0.375419, 0.713862, 1.541008, 0.0])
    partial = [value(luce.pld_loss, s, t, y, top_k=k) for k in (1, 2, 3, 4)]
    assert partial[0] == digits(0.035828)
    assert partial[1] - partial[0] == digits(0.455491)
    assert partial[2] - partial[1] == digits(0.361723)
    assert partial[3] == pytest.approx(partial[2], rel=1e-14)


def test_pld_gradient():
    expected = [-0.3109445285, -0.1114694739, -0.0298709124, 0.4522849148]
    assert gradient(luce.pld_loss, s, t, y) == digits(expected, 10)
    assert formulas.pld_gradient(s, t, y) == digits(expected, 10)


def test_pld_curvature():
    hessian = torch.autograd.functional.hessian(
        lambda x: luce.pld_loss(x, tensor(t), torch.tensor(y)), tensor(s)
    )
    assert torch.linalg.eigvalsh(hessian).tolist() == digits([0, 0.027010, 0.153729, 0.319622])


def test_pld_truncated():
    assert value(luce.pld_loss, s, t, y, top_k=1) == digits(0.035828)
    expected = [0.014629, 0.003264, -0.029871, 0.011977]
    assert gradient(luce.pld_loss, s, t, y, top_k=1) == digits(expected)
    assert value(luce.pld_loss, s, t, y, top_k=2) == digits(0.491319)
    expected = [-0.310945, 0.072991, -0.029871, 0.267825]
    assert gradient(luce.pld_loss, s, t, y, top_k=2) == digits(expected)
    for k in (3, 4, 100):
        assert value(luce.pld_loss, s, t, y, top_k=k) == digits(0.853042)
    for k in (1, 2, 3, 4):
        assert value(luce.pld_loss, s, t, y, top_k=k) == pytest.approx(
            formulas.pld(s, t, y, top_k=k), rel=1e-12
        )


def test_pld_with_a_softened_teacher():
    weights = formulas.pld_weights(t, formulas.ranking(t, y), 2.0)
    assert weights == digits([0.174490, 0.451182, 0.273656, 0.100672])
    assert value(luce.pld_loss, s, t, y, teacher_temperature=2.0) == digits(0.8092938100, 10)
    expected = [-0.203468, -0.159776, -0.054615, 0.417859]
    assert gradient(luce.pld_loss, s, t, y, teacher_temperature=2.0) == digits(expected)


def test_pld_where_teacher_and_label_agree():
    expected = [-0.540257, -0.203425, 0.614067, 0.129614]
    for label in (0, None):  # without a label the teacher's favourite takes its place
        assert value(luce.pld_loss, s, t, label) == digits(1.9659124137, 10)
        assert gradient(luce.pld_loss, s, t, label) == digits(expected)


def test_pld_of_a_student_that_equals_its_teacher_is_not_stationary():
    assert value(luce.pld_loss, t, t, 0) == digits(0.415756)
    assert gradient(luce.pld_loss, t, t, 0) == digits([-0.230938, 0.067278, 0.098954, 0.064706])


def test_pld_of_a_batch():
    assert value(luce.pld_loss, S[1], T[1], 1) == digits(1.488432)
    assert value(luce.pld_loss, S, T, Y) == digits(1.170737)
    assert value(luce.pld_loss, S, T, Y, reduction="sum") == digits(2 * 1.170737, 5)


def test_pld_ties_rank_the_lower_class_first():
    tied = [1.0, 1.0, 0.0, 1.0]
    assert formulas.ranking(tied, y) == [2, 0, 1, 3]
    assert value(luce.pld_loss, s, tied, y) == digits(0.710530)
    weights = formulas.pld_weights(tied, [2, 3, 1, 0])
    assert formulas.ranking_cost(s, [2, 3, 1, 0], weights) == digits(0.817542)  # the other way round


STRESS = [
    ([120.0, 0.0, -1.0, -2.0], 0, 0.12557399, [0.0, -0.078578, 0.031779, 0.046799]),
    ([1000.0, 0.0, -1000.0, 500.0], 2, 308.235153, [0.095435, -0.234731, -0.095435, 0.234731]),
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("logits", "label", "loss", "slope"), STRESS)
def test_pld_under_stress(logits, label, loss, slope, dtype):
    student = torch.tensor([logits], dtype=dtype, requires_grad=True)
    result = luce.pld_loss(student, torch.tensor([t], dtype=dtype), torch.tensor([label]))
    result.backward()
    # Six decimals of 308 are beyond float32, whose scan carries logits of 1000 to six digits.
    assert result.item() == pytest.approx(loss, rel=2e-7 if dtype == torch.float32 else 2e-9, abs=5e-9)
    assert student.grad[0].tolist() == digits(slope, 5 if dtype == torch.float32 else 6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_pld_of_a_confidently_wrong_teacher(dtype):
    """Class 0 is pushed up among the classes other than the label, and the label is left alone."""
    student = torch.tensor([s], dtype=dtype, requires_grad=True)
    wrong = torch.tensor([[20.0, 1.0, 0.1, -1.0]], dtype=dtype)
    loss = luce.pld_loss(student, wrong, torch.tensor([y]))
    assert loss.item() == digits(0.713862)
    assert loss.item() == pytest.approx(log(1 + exp(-1.5) + exp(-0.2)), rel=1e-6)
    loss.backward()
    assert student.grad[0].tolist() == digits([-0.510251, 0.109278, -7e-10, 0.400973])
    assert student.grad[0, 2].item() == pytest.approx(-7.0e-10, abs=2e-10)


def test_pld_of_an_even_student():
    assert value(luce.pld_loss, [0.0] * 4, t, y) == digits(0.995992)
    weights = formulas.pld_weights(t, formulas.ranking(t, y))
    expected = sum(a * log(4 - k) for k, a in enumerate(weights))
    assert value(luce.pld_loss, [0.0] * 4, t, y) == pytest.approx(expected, rel=1e-12)
    assert gradient(luce.pld_loss, [0.0] * 4, t, y) == digits([-0.401519, 0.119182, -0.071576, 0.353913])


# The classical list-wise losses


def test_listmle():
    assert value(luce.listmle_loss, s, t) == digits(5.252225)
    assert value(luce.listmle_loss, s, t, y) == digits(2.630289)
    assert value(luce.listmle_loss, s, t, y) / 4 == digits(0.657572)
    for label in (None, 0, 1, 2, 3):
        expected = formulas.listmle(s, t, label)
        assert value(luce.listmle_loss, s, t, label) == pytest.approx(expected, rel=1e-12)


def test_listmle_of_the_documentation_of_tf_ranking():
    """Labels 1, 0 and scores 0.6, 0.8: one choice between two."""
    result = value(luce.listmle_loss, [[0.6, 0.8]], [[1.0, 0.0]])
    assert result == pytest.approx(log(1 + exp(0.8 - 0.6)), rel=1e-14)
    assert result == digits(0.7981389, 7)


def test_listmle_of_an_even_student_counts_the_orders():
    assert value(luce.listmle_loss, [0.0] * 5, [3.0, 1.0, 4.0, 1.0, 5.0]) == pytest.approx(
        log(math.factorial(5))
    )


def test_p_listmle():
    assert value(luce.p_listmle_loss, s, t, normalize=False) == digits(22.922779)
    assert value(luce.p_listmle_loss, s, t, y, normalize=False) == digits(6.310524)
    assert value(luce.p_listmle_loss, s, t, y) == digits(0.573684)
    assert value(luce.p_listmle_loss, s, t, y) == pytest.approx(6.310524 / (7 + 3 + 1), abs=1e-6)
    for normalize in (True, False):
        expected = formulas.p_listmle(s, t, normalize=normalize)
        assert value(luce.p_listmle_loss, s, t, normalize=normalize) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_p_listmle_of_a_thousand_classes(dtype):
    """Normalised weights are 2^-k to any precision that can be had; the k-th choice is among C - k + 1."""
    classes = 1000
    student = torch.zeros(1, classes, dtype=dtype)
    expected = sum(2.0**-k * log(classes - k + 1) for k in range(1, 100))
    assert luce.p_listmle_loss(student, student).item() == pytest.approx(expected, rel=1e-6)


def test_listnet():
    z = exp(2.0) + exp(1.0) + exp(0.1) + exp(-1.0)
    mean_logit = (exp(2.0) * 0.5 - exp(1.0) + exp(0.1) * 2.0 + exp(-1.0) * 0.3) / z
    expected = log(exp(0.5) + exp(-1.0) + exp(2.0) + exp(0.3)) - mean_logit
    assert value(luce.listnet_loss, s, t) == pytest.approx(expected, rel=1e-12)
    assert expected == digits(2.090717)
    assert value(luce.listnet_loss, s, t, temperature=3.0) == pytest.approx(
        formulas.listnet(s, t, 3.0), rel=1e-12
    )
    p, q = formulas.softmax(t), formulas.softmax(s)
    assert gradient(luce.listnet_loss, s, t) == pytest.approx(
        [b - a for a, b in zip(p, q, strict=True)], rel=1e-9
    )


# Cross-entropy


def test_cross_entropy():
    expected = (
        log(exp(0.5) + exp(-1.0) + exp(2.0) + exp(0.3))
        - 2.0
        + log(exp(1.2) + exp(0.1) + exp(-0.7) + exp(0.4))
        - 0.1
    ) / 2
    result = luce.cross_entropy_loss(tensor(S), torch.tensor(Y)).item()
    assert result == pytest.approx(expected, rel=1e-12)
    assert expected == digits(1.066927)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 0.9])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_cross_entropy_is_that_of_pytorch(label_smoothing, reduction):
    student, target = torch.randn(2, 5, 3, dtype=torch.float64), torch.randint(5, (2, 3))
    target[0, 1] = -100
    options = {"label_smoothing": label_smoothing, "reduction": reduction}
    result = luce.cross_entropy_loss(student, target, **options)
    torch.testing.assert_close(result, F.cross_entropy(student, target, **options))


def test_label_smoothing():
    expected = mean(lambda a, label: formulas.cross_entropy(a, label, 0.2), S, Y)
    result = luce.cross_entropy_loss(tensor(S), torch.tensor(Y), label_smoothing=0.2).item()
    assert result == pytest.approx(expected, rel=1e-12)


# KD


def test_kd_spelled_out():
    """Two classes: log-odds 1 of the teacher against none of the student."""
    p = 1 / (1 + exp(-1.0))
    expected = p * log(p / 0.5) + (1 - p) * log((1 - p) / 0.5)
    assert value(luce.kd_loss, [[0.0, 0.0]], [[1.0, 0.0]]) == pytest.approx(expected, rel=1e-12)
    softened = value(luce.kd_loss, [[0.0, 0.0]], [[3.0, 0.0]], temperature=3.0)
    assert softened == pytest.approx(9 * expected, rel=1e-12)


@pytest.mark.parametrize(
    ("temperature", "expected"), [(1.0, 0.979018), (2.0, 1.109504), (4.0, 1.120407), (1e4, 1.085960)]
)
def test_kd(temperature, expected):
    assert value(luce.kd_loss, S, T, temperature=temperature) == digits(
        expected, 5 if temperature > 10 else 6
    )
    bare = value(luce.kd_loss, S, T, temperature=temperature, scale_by_temperature=False)
    assert temperature**2 * bare == digits(expected, 5 if temperature > 10 else 6)


def test_kd_of_three_rows():
    assert value(luce.kd_loss, S3, T3) == digits(0.678967)
    assert value(luce.kd_loss, S3, T3, temperature=4.0) == digits(0.781604)


def test_kd_gradient():
    expected = [[-0.207546, -0.206347, 0.277968, 0.135924], [0.212666, -0.258001, 0.024805, 0.020530]]
    assert gradient(luce.kd_loss, S, T, temperature=4.0) == table(expected)


def test_kd_is_nearly_logit_matching_at_a_high_temperature():
    limit = mean(formulas.logit_matching_limit, S, T)
    assert limit == digits(1.085938)
    assert value(luce.kd_loss, S, T, temperature=1e4) == pytest.approx(limit, rel=1e-4)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_kd_is_kl_div_of_pytorch(temperature):
    log_q, p = F.log_softmax(tensor(S) / temperature, 1), F.softmax(tensor(T) / temperature, 1)
    expected = F.kl_div(log_q, p, reduction="batchmean").item() * temperature**2
    assert value(luce.kd_loss, S, T, temperature=temperature) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_reverse_kl_swaps_the_networks(temperature):
    expected = mean(lambda a, b: formulas.kd(b, a, temperature), S, T)
    assert value(luce.reverse_kl_loss, S, T, temperature=temperature) == pytest.approx(expected, rel=1e-12)
    bare = value(luce.reverse_kl_loss, S, T, temperature=temperature, scale_by_temperature=False)
    assert temperature**2 * bare == pytest.approx(expected, rel=1e-12)


def test_jsd_spelled_out():
    """The student knows nothing, the teacher is sure of class 0: the mixture is (3, 1) / 4."""
    sure = [[200.0, 0.0]]
    expected = 0.5 * log(1 / 0.75) + 0.5 * (0.5 * log(0.5 / 0.75) + 0.5 * log(0.5 / 0.25))
    assert value(luce.jsd_loss, [[0.0, 0.0]], sure) == pytest.approx(expected, rel=1e-12)
    # With a tenth of the teacher in it, the mixture is (0.55, 0.45).
    expected = 0.1 * log(1 / 0.55) + 0.9 * (0.5 * log(0.5 / 0.55) + 0.5 * log(0.5 / 0.45))
    assert value(luce.jsd_loss, [[0.0, 0.0]], sure, beta=0.1) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("beta", "temperature"), [(0.5, 1.0), (0.2, 1.0), (0.7, 3.0)])
def test_jsd(beta, temperature):
    expected = mean(lambda a, b: formulas.jsd(a, b, beta, temperature), S, T)
    options = {"beta": beta, "temperature": temperature}
    assert value(luce.jsd_loss, S, T, **options) == pytest.approx(expected, rel=1e-12)
    bare = value(luce.jsd_loss, S, T, **options, scale_by_temperature=False)
    assert temperature**2 * bare == pytest.approx(expected, rel=1e-12)


# DKD


def test_dkd():
    assert value(luce.dkd_loss, S, T, Y) == digits(5.197502)  # temperature 4, alpha 1, beta 8
    assert value(luce.dkd_loss, S, T, Y, beta=0.0) == digits(0.697900)
    assert value(luce.dkd_loss, S, T, Y, alpha=0.0, beta=1.0) == digits(0.562450)
    assert value(luce.dkd_loss, S, T, Y, scale_by_temperature=False) == digits(5.197502 / 16)
    expected = mean(lambda a, b, label: formulas.dkd(a, b, label, 0.3, 2.0, 1.5), S, T, Y)
    assert value(luce.dkd_loss, S, T, Y, alpha=0.3, beta=2.0, temperature=1.5) == pytest.approx(
        expected, rel=1e-12
    )


def test_dkd_gradient():
    expected = [[-1.148765, -1.439945, 0.277968, 2.310742], [1.456054, -0.258001, -0.451085, -0.746968]]
    assert gradient(luce.dkd_loss, S, T, Y) == table(expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_dkd_of_a_saturated_target(dtype):
    """The student leaves e^-200 to the other class, the teacher a half: 1/2 log(1/2) + 1/2 log(1/2 e^200)."""
    student = torch.tensor([[200.0, 0.0]], dtype=dtype)
    teacher = torch.tensor([[0.0, 0.0]], dtype=dtype)
    result = luce.dkd_loss(student, teacher, torch.tensor([0]), temperature=1.0).item()
    assert result == pytest.approx(100 - log(2), rel=1e-6)


# Matching and relations


def test_logit_matching():
    squares = [1.5**2, 2.0**2, 1.9**2, 1.3**2, 1.0**2, 2.4**2, 0.4**2, 0.5**2]
    assert value(luce.logit_matching_loss, S, T) == pytest.approx(sum(squares) / 8, rel=1e-12)
    assert value(luce.logit_matching_loss, S, T) == digits(2.34)
    differences = [[2 * (a - b) / 8 for a, b in zip(*rows, strict=True)] for rows in zip(S, T, strict=True)]
    assert gradient(luce.logit_matching_loss, S, T) == [pytest.approx(row) for row in differences]


@pytest.mark.parametrize(
    ("temperature", "scale", "inter", "intra"),
    [  # the authors' code has an epsilon of 1e-8 beside the norm: 12.942043 and 11.048312 at temperature 4
        (1.0, True, 0.892383, 0.719502),
        (4.0, False, 0.808877, 0.690518),
        (4.0, True, 12.942039, 11.048295),
    ],
)
def test_dist(temperature, scale, inter, intra):
    options = {"temperature": temperature, "scale_by_temperature": scale}
    within = value(luce.dist_loss, S3, T3, beta=1.0, gamma=0.0, **options)
    across = value(luce.dist_loss, S3, T3, beta=0.0, gamma=1.0, **options)
    assert within == digits(inter)
    assert across == digits(intra)
    assert value(luce.dist_loss, S3, T3, beta=0.3, gamma=2.0, **options) == pytest.approx(
        0.3 * within + 2 * across
    )


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_dist_is_made_of_correlations(temperature):
    expected = formulas.dist_terms(S3, T3, temperature)
    for i, options in enumerate(({"beta": 1.0, "gamma": 0.0}, {"beta": 0.0, "gamma": 1.0})):
        result = value(luce.dist_loss, S3, T3, **options, temperature=temperature, scale_by_temperature=False)
        assert result == pytest.approx(expected[i], rel=1e-12)


# Partial KD, and KD in three parts


Z, V = [1.0, 0.5, -0.5, 0.0], [4.0, 2.0, -1.0, 0.0]
ANY = (7.0, 7.0, 7.0, 7.0)
RELATION = tensor([[0.0, 0.6, 0.1, 0.3], ANY, ANY, ANY])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0.861780, 0.046073, 0.046073, 0.046073]),
        ({"temperature": 2.0}, [0.630796, 0.123068, 0.123068, 0.123068]),
        ({"keep": "topk", "top_k": 2}, [0.861780, 0.116629, 0.010795, 0.010795]),
        ({"keep": "topk", "top_k": 0.5, "temperature": 2.0}, [0.630796, 0.232057, 0.068574, 0.068574]),
        (
            {"keep": "true_prob+weight_sim", "relation": RELATION, "temperature": 2.0},
            [0.630796, 0.221523, 0.036920, 0.110761],
        ),
        ({"keep": "class_mean", "relation": RELATION, "temperature": 2.0}, [0.0, 0.6, 0.1, 0.3]),
        ({"keep": "uniform", "temperature": 2.0}, [0.925, 0.025, 0.025, 0.025]),
        ({"keep": "uniform", "label_smoothing": 0.4}, [0.7, 0.1, 0.1, 0.1]),
    ],
    ids=lambda x: x.get("keep", "true_prob") if isinstance(x, dict) else "",
)
def test_partial_targets(options, expected):
    target = partial_target(tensor([V]), torch.tensor([0]), **options)
    assert target[0].tolist() == digits(expected)
    temperature = options.get("temperature", 1.0)
    log_q = formulas.log_softmax(Z, temperature)
    kl = sum(a * (log(a) - b) for a, b in zip(target[0].tolist(), log_q, strict=True) if a)
    assert value(luce.partial_kd_loss, [Z], [V], [0], **options) == pytest.approx(temperature**2 * kl)


@pytest.mark.parametrize(
    ("temperature", "parts", "whole"),
    [
        (1.0, (0.678513, 0.247046, -0.055411), 0.870147),
        (2.0, (0.662346, 0.572273, -0.045069), 1.189549),
    ],
)
def test_kd_in_three_parts(temperature, parts, whole):
    options = {"temperature": temperature, "scale_by_temperature": False}
    names = ("guidance_weight", "smooth_weight", "relation_weight")
    found = [
        value(
            luce.decomposed_kd_loss,
            [Z],
            [V],
            [0],
            **options,
            **{other: float(other == name) for other in names},
        )
        for name in names
    ]
    assert found == digits(list(parts))
    assert value(luce.decomposed_kd_loss, [Z], [V], [0], **options) == digits(whole)
    p, log_q = formulas.softmax(V, temperature), formulas.log_softmax(Z, temperature)
    m = (p[1] + p[2] + p[3]) / 3
    assert found[0] == pytest.approx(-p[0] * log_q[0])
    assert found[1] == pytest.approx(-m * sum(log_q[1:]))
    assert found[2] == pytest.approx(-sum((a - m) * b for a, b in zip(p[1:], log_q[1:], strict=True)))


@pytest.mark.parametrize(
    ("temperature", "expected"),
    [
        (1.0, [-0.420548, 0.171038, 0.096310, 0.153199]),
        (2.0, [-0.560049, 0.100448, 0.214485, 0.245117]),
    ],
)
def test_the_gradient_that_a_teacher_rescales(temperature, expected):
    """A tenth of cross-entropy and nine of KD, whose parts together are KD."""
    task = gradient(lambda s, t, y: luce.cross_entropy_loss(s, y), [Z], [V], [0])
    kd = gradient(luce.decomposed_kd_loss, [Z], [V], [0], temperature=temperature)
    assert [0.1 * a + 0.9 * b for a, b in zip(task[0], kd[0], strict=True)] == digits(expected)


# Multi-level logit distillation


@pytest.mark.parametrize(
    ("rows", "temperature", "batch", "classes"),
    [(3, 1.0, 0.064820, 0.218987), (3, 4.0, 0.000304, 0.013994), (2, 4.0, 0.000121, 0.010495)],
)
def test_mlld(rows, temperature, batch, classes):
    s, t = S3[:rows], T3[:rows]
    off = {"instance_weight": 0.0, "batch_weight": 0.0, "class_weight": 0.0}
    instance, of_rows, of_classes = (
        value(luce.mlld_loss, s, t, temperatures=[temperature], **{**off, name: 1.0}) for name in off
    )
    assert instance == pytest.approx(value(luce.kd_loss, s, t, temperature=temperature), rel=1e-12)
    assert of_rows == digits(batch)
    assert of_classes == digits(classes)
    weights = {"instance_weight": 0.5, "batch_weight": 3.0, "class_weight": 0.25}
    whole = value(luce.mlld_loss, s, t, temperatures=[temperature], **weights)
    assert whole == pytest.approx(0.5 * instance + 3 * of_rows + 0.25 * of_classes)


def test_mlld_spelled_out():
    """One row, two classes: a student that knows nothing, a teacher that is sure."""
    options = {"temperatures": [1.0], "instance_weight": 0.0}
    sure, even = [[200.0, 0.0]], [[0.0, 0.0]]
    # 1 x 1: (1 - 1/2)^2; 2 x 2: [[1, 0], [0, 0]] against quarters, over two classes.
    assert value(luce.mlld_loss, even, sure, class_weight=0.0, **options) == pytest.approx(0.25)
    assert value(luce.mlld_loss, even, sure, batch_weight=0.0, **options) == pytest.approx(
        (9 / 16 + 3 / 16) / 2
    )


def test_the_temperatures_of_mlld_add_up():
    parts = [value(luce.mlld_loss, S3, T3, temperatures=[t]) for t in (2.0, 3.0, 4.0, 5.0, 6.0)]
    assert value(luce.mlld_loss, S3, T3) == pytest.approx(sum(parts), rel=1e-12)


# Pairs of classes, and rankings drawn from the teacher


def test_rkkd_spelled_out():
    """The teacher ranks 0, 2, 1 and the student 0, 1, 2: one pair of three disagrees."""
    tanh = math.tanh
    agreement = tanh(1.5) * tanh(0.7) + tanh(0.9) * tanh(1.1) - tanh(0.6) * tanh(0.4)
    student, teacher = [[0.8, 0.1, -0.3]], [[1.2, -0.3, 0.3]]
    assert value(luce.rkkd_loss, student, teacher) == pytest.approx(1 - agreement / 3, rel=1e-12)
    assert value(luce.rkkd_loss, student, teacher, steepness=1e6) == pytest.approx(1 - 1 / 3)
    top = {"channels": "top", "share": 2, "steepness": 0.5}
    assert value(luce.rkkd_loss, student, teacher, **top) == pytest.approx(1 - tanh(0.45) * tanh(0.55))


def test_ranking_losses_spelled_out():
    """The teacher has 0 before 1, 0 before 2 and 2 before 1; the student's leads are 0.7, 1.1 and -0.4."""
    student, teacher = [[0.8, 0.1, -0.3]], [[1.2, -0.3, 0.3]]
    assert value(luce.ranking_hinge_loss, student, teacher) == pytest.approx((0.3 + 0 + 1.4) / 3)
    expected = (log(1 + exp(-0.7)) + log(1 + exp(-1.1)) + log(1 + exp(0.4))) / 3
    assert value(luce.ranking_logistic_loss, student, teacher) == pytest.approx(expected, rel=1e-12)


def test_rankdistil_spelled_out():
    """A teacher that is sure of 0, 2, 1 lets nothing else be drawn."""
    student, teacher = [[log(2.0), log(3.0), 0.0]], [[800.0, 0.0, 400.0]]
    assert value(luce.rankdistil_loss, student, teacher) == pytest.approx(log(6 / 2) + log(4 / 1), rel=1e-12)
    assert value(luce.rankdistil_loss, student, teacher, top_k=1) == pytest.approx(log(3), rel=1e-12)
    # Half of a temperature is twice the logits: worths 4, 9 and 1.
    cold = value(luce.rankdistil_loss, student, teacher, temperature=0.5)
    assert cold == pytest.approx(log(14 / 4) + log(10 / 1), rel=1e-12)


def test_hard_label():
    expected = [-math.log(formulas.softmax(s)[t.index(max(t))]) for s, t in zip(S, T, strict=True)]
    assert value(luce.hard_label_loss, S, T) == pytest.approx(sum(expected) / len(expected), rel=1e-12)
    assert value(luce.hard_label_loss, [[0.0, 0.0, 5.0]], [[2.0, 2.0, 1.0]]) == pytest.approx(
        math.log(2 + math.exp(5)),
        rel=1e-12,  # of equal logits the first
    )
