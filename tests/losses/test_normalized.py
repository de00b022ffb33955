"""NormKD, its combination with DKD, and logit standardization: losses on logits in units of their spread."""

from __future__ import annotations

import copy
import math
import pickle
import statistics
from types import SimpleNamespace

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

import luce
from luce import CrossEntropyLoss, KDLoss, PLDLoss, Standardized, WeightedSum
from luce.losses import LogitLoss, standardize
from luce.methods import LogitMethod
from luce.signals import DenseSignal, LiveTeacher

from . import formulas
from .catalogue import IGNORED, UNLABELLED, batch
from .test_golden import S3, S, T, Y, digits, gradient, value
from .test_laws import laws, rows, slope

inf, nan = math.inf, math.nan

# One row of teacher and student, and a second one.
ROW_T, ROW_S = [4.0, 1.0, -2.0, 0.5], [1.5, 1.0, -1.0, 0.0]
TWO_T, TWO_S = [ROW_T, [0.6, -0.2, 0.1, -0.5]], [ROW_S, [0.2, 0.3, -0.1, -0.4]]
T_NORM = st.sampled_from([0.5, 1.0, 2.0, 4.0])


def deviation(row, unbiased=True):
    return statistics.stdev(row) if unbiased else statistics.pstdev(row)


def normkd(s, t, t_norm, unbiased=True):
    """The formula in Python floats: KL at one temperature per network, times the teacher's squared."""
    temperatures = [t_norm * deviation(row, unbiased) for row in (s, t)]
    log_q, log_p = (formulas.log_softmax(row, c) for row, c in zip((s, t), temperatures, strict=True))
    return temperatures[1] ** 2 * formulas.kl(log_p, log_q)


def normdkd(s, t, y, alpha, beta, t_norm, unbiased=True):
    s, t, weight = (
        [x / (t_norm * deviation(s, unbiased)) for x in s],
        [x / (t_norm * deviation(t, unbiased)) for x in t],
        (t_norm * deviation(t, unbiased)) ** 2,
    )
    return weight * (alpha * formulas.tckd(s, t, y) + beta * formulas.nckd(s, t, y))


# NormKD


def test_normkd_spelled_out():
    """Two classes, a apart: the deviation is a / sqrt(2), and at 1 / sqrt(2) of it they are at 1 and -1."""
    p, q = 1 / (1 + math.exp(-2.0)), 1 / (1 + math.exp(2.0))
    expected = 1.5**2 * (p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q)))
    result = value(luce.normkd_loss, [[0.0, 0.5]], [[3.0, 0.0]], t_norm=1 / math.sqrt(2))
    assert result == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("t_norm", "unbiased", "expected"),
    [(2.0, True, 0.306769), (1.0, True, 0.293828), (2.0, False, 0.307492), (1.0, False, 0.282315)],
)
def test_normkd(t_norm, unbiased, expected):
    assert value(luce.normkd_loss, ROW_S, ROW_T, t_norm=t_norm, unbiased=unbiased) == digits(expected)
    assert normkd(ROW_S, ROW_T, t_norm, unbiased) == digits(expected)


def test_normkd_of_a_batch():
    assert value(luce.normkd_loss, TWO_S[1], TWO_T[1]) == digits(0.074162)
    assert value(luce.normkd_loss, TWO_S, TWO_T) == digits(0.190465)


@pytest.mark.parametrize(
    ("t_norm", "expected"),
    [
        (2.0, [-0.536343, 0.765809, -0.038706, -0.190760]),
        (1.0, [-0.572950, 0.779039, -0.080385, -0.125704]),
    ],
)
def test_normkd_gradient(t_norm, expected):
    assert gradient(luce.normkd_loss, ROW_S, ROW_T, t_norm=t_norm) == digits(expected)


@pytest.mark.parametrize(("t_norm", "expected"), [(10.0, 0.287235), (100.0, 0.279580), (1e5, 0.278667)])
def test_normkd_tends_to_one_minus_the_correlation(t_norm, expected):
    assert value(luce.normkd_loss, ROW_S, ROW_T, t_norm=t_norm) == digits(expected, 5 if t_norm > 1e3 else 6)
    limit = statistics.variance(ROW_T) * 3 / 4 * (1 - statistics.correlation(ROW_S, ROW_T))
    assert limit == digits(0.278667)


def test_normdkd():
    target = {"alpha": 1.0, "beta": 0.0}
    rest = {"alpha": 0.0, "beta": 1.0}
    assert value(luce.normdkd_loss, ROW_S, ROW_T, 0, **target) == digits(0.121104)
    assert value(luce.normdkd_loss, ROW_S, ROW_T, 0, **rest) == digits(0.325182)
    assert value(luce.normdkd_loss, ROW_S, ROW_T, 0) == digits(0.121104 + 8 * 0.325182, 5)
    options = {"alpha": 4.0, "beta": 5.0, "t_norm": 0.75, "unbiased": False}
    expected = normdkd(ROW_S, ROW_T, 3, **options)
    assert value(luce.normdkd_loss, ROW_S, ROW_T, 3, **options) == pytest.approx(expected, rel=1e-12)


@laws
@given(rows(), T_NORM, st.booleans())
def test_normkd_and_normdkd_are_their_formulas(data, t_norm, unbiased):
    student, teacher, target = data
    s, t, y = student[0].tolist(), teacher[0].tolist(), int(target)
    assume(len(set(s)) > 1)
    options = {"t_norm": t_norm, "unbiased": unbiased}
    close = {"rel": 1e-9, "abs": 1e-9}  # of a weight that may reach 1e3
    assert luce.normkd_loss(student, teacher, **options).item() == pytest.approx(
        normkd(s, t, **options), **close
    )
    result = luce.normdkd_loss(student, teacher, target, alpha=0.7, beta=3.0, **options).item()
    assert result == pytest.approx(normdkd(s, t, y, 0.7, 3.0, **options), **close)


@laws
@given(rows(), T_NORM, st.sampled_from([0.25, 3.0]), st.integers(-800, 800))
def test_normkd_sees_neither_scale_nor_offset_of_the_student(data, t_norm, scale, offset):
    student, teacher, _ = data
    expected = luce.normkd_loss(student, teacher, t_norm=t_norm)
    moved = luce.normkd_loss(scale * student + offset / 8, teacher, t_norm=t_norm)
    assert_close(moved, expected, rtol=1e-9, atol=1e-11)
    # The teacher's scale is a weight: squared, in front.
    moved = luce.normkd_loss(student, scale * teacher + offset / 8, t_norm=t_norm)
    assert_close(moved, scale**2 * expected, rtol=1e-9, atol=1e-11)


@laws
@given(rows(), st.sampled_from([0.25, 3.0]), st.integers(-80, 80))
def test_normkd_is_zero_for_a_positive_affine_image_of_the_teacher_and_only_then(data, scale, offset):
    student, teacher, _ = data
    assert luce.normkd_loss(scale * teacher + offset / 8, teacher).item() == pytest.approx(0, abs=1e-12)
    if len(set(student[0].tolist())) > 1:
        correlation = statistics.correlation(student[0].tolist(), teacher[0].tolist())
        assert (luce.normkd_loss(student, teacher).item() > 1e-12) is (correlation < 1 - 1e-9)


@laws
@given(rows(smallest=3), T_NORM, st.booleans())
def test_the_gradient_of_normkd(data, t_norm, unbiased):
    """That of KD without its part along the student's own logits, which it can neither stretch nor shift."""
    student, teacher, _ = data
    assume(len(set(student[0].tolist())) > 1)
    result = slope(luce.normkd_loss, student, teacher, t_norm=t_norm, unbiased=unbiased)
    sigma_s, sigma_t = (x.std(-1, correction=int(unbiased)) for x in (student, teacher))
    g = (student / (t_norm * sigma_s)).softmax(-1) - (teacher / (t_norm * sigma_t)).softmax(-1)
    d = student - student.mean()
    expected = t_norm * sigma_t**2 / sigma_s * (g - d * (d * g).sum() / (d * d).sum())
    assert_close(result, expected, rtol=1e-8, atol=1e-9)
    size = float(expected.abs().max() * d.abs().max()) + 1e-9
    assert abs(result.sum().item()) < 1e-10 * size + 1e-10
    assert abs((result * d).sum().item()) < 1e-10 * size + 1e-10


@laws
@given(rows(), T_NORM)
def test_normkd_is_kd_of_standardized_logits_weighted_by_the_teacher_s_variance(data, t_norm):
    student, teacher, target = data
    assume(len(set(student[0].tolist())) > 1)
    expected = luce.kd_loss(standardize(student), standardize(teacher), temperature=t_norm)
    expected = teacher.var() * expected
    assert_close(luce.normkd_loss(student, teacher, t_norm=t_norm), expected, rtol=1e-9, atol=1e-10)
    expected = luce.dkd_loss(standardize(student), standardize(teacher), target, temperature=t_norm)
    result = luce.normdkd_loss(student, teacher, target, t_norm=t_norm)
    assert_close(result, teacher.var() * expected, rtol=1e-9, atol=1e-9)


@laws
@given(rows(), T_NORM)
def test_normkd_is_target_and_rest_of_normdkd(data, t_norm):
    """TCKD + (1 - p_y) NCKD, with p at the teacher's temperature."""
    student, teacher, target = data
    of_target = luce.normdkd_loss(student, teacher, target, alpha=1.0, beta=0.0, t_norm=t_norm)
    of_rest = luce.normdkd_loss(student, teacher, target, alpha=0.0, beta=1.0, t_norm=t_norm)
    rest = 1 - (teacher / (t_norm * teacher.std())).softmax(-1)[0, target[0]]
    expected = luce.normkd_loss(student, teacher, t_norm=t_norm)
    assert_close(of_target + rest * of_rest, expected, rtol=1e-9, atol=1e-10)


def test_normkd_of_rows_of_equal_spread_is_kd():
    spread = torch.tensor(S3, dtype=torch.float64)
    spread = 3 * (spread - spread.mean(-1, keepdim=True)) / spread.std(-1, keepdim=True)
    student, teacher = spread, spread.roll(1, 0) + 2
    expected = luce.kd_loss(student, teacher, temperature=6.0)
    assert_close(luce.normkd_loss(student, teacher, t_norm=2.0), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.only(lambda case: case.loss.scale_blind)
def test_constant_rows_cost_nothing_and_have_no_gradient(case, dtype):
    student, teacher, target = batch(4, dtype=dtype)
    student[1], teacher[2] = 3.0, -7.0
    keep = torch.tensor([0, 3])
    values = case(student, teacher, target, reduction="none")
    assert (values[1:3] == 0).all()
    assert_close(values[keep], case(student[keep], teacher[keep], target[keep], reduction="none"))
    result = case.grad(student, teacher, target)
    assert (result[1:3] == 0).all()
    assert_close(2 * result[keep], case.grad(student[keep], teacher[keep], target[keep]))


def test_a_part_of_normdkd_that_is_switched_off_may_be_infinite():
    student, teacher, _ = batch(3)
    student[:, 4] = -inf
    target = torch.tensor([0, 1, 2])
    assert luce.normdkd_loss(student, teacher, target).item() == inf
    assert luce.normdkd_loss(student, teacher, target, beta=0.0).isfinite()


# Standardized logits


@pytest.mark.parametrize(("unbiased", "most"), [(True, 6 / math.sqrt(7)), (False, math.sqrt(6))])
def test_the_largest_z_score(unbiased, most):
    one_hot = torch.eye(7, dtype=torch.float64)[:1]
    assert standardize(one_hot, unbiased=unbiased).max().item() == pytest.approx(most, rel=1e-14)


@pytest.mark.parametrize("unbiased", [True, False])
def test_normkd_at_a_high_t_norm(unbiased):
    s, t = torch.tensor([ROW_S], dtype=torch.float64), torch.tensor([ROW_T], dtype=torch.float64)
    found = luce.normkd_loss(s, t, t_norm=1e5, unbiased=unbiased).item()
    expected = statistics.pvariance(ROW_T) * (1 - statistics.correlation(ROW_S, ROW_T))
    assert found == pytest.approx(expected, rel=1e-4)


def test_standardize_spelled_out():
    """Of 1, 2, 6: mean 3, squares 4 + 1 + 9 = 14, so a deviation of sqrt(7), or sqrt(14 / 3) biased."""
    x = torch.tensor([1.0, 2.0, 6.0], dtype=torch.float64)
    assert standardize(x).tolist() == pytest.approx([d / math.sqrt(7) for d in (-2, -1, 3)], rel=1e-14)
    biased = [d / math.sqrt(14 / 3) for d in (-2, -1, 3)]
    assert standardize(x, unbiased=False).tolist() == pytest.approx(biased, rel=1e-14)


@laws
@given(rows(smallest=3), st.booleans())
def test_standardized_rows(data, unbiased):
    student, _, _ = data
    assume(len(set(student[0].tolist())) > 1)
    classes = student.shape[-1]
    z = standardize(student, unbiased=unbiased)
    expected = (student - student.mean()) / student.std(correction=int(unbiased))
    assert_close(z, expected, rtol=1e-12, atol=1e-13)
    assert z.max() <= (classes - 1) / math.sqrt(classes if unbiased else classes - 1) + 1e-12
    torch.autograd.gradcheck(lambda x: standardize(x, unbiased=unbiased), student.requires_grad_())


def test_standardize_second_derivative():
    student, _, _ = batch(3)
    torch.autograd.gradgradcheck(standardize, student.requires_grad_())


@pytest.mark.parametrize(("rows", "class_dim"), [((2, 3, 2), 1), ((2, 3), 0), ((2, 3), -1), ((), 1)])
def test_standardize_along_any_dimension(rows, class_dim):
    logits, _, _ = batch(*rows)
    expected = standardize(logits, class_dim=-1)
    axis = class_dim if rows else 0
    assert_close(standardize(logits.movedim(-1, axis), class_dim=class_dim).movedim(axis, -1), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("offset", [0.0, 300.0, 1e4])
@pytest.mark.parametrize("spread", [1.0, 1e3, 1e4])
def test_standardize_loses_no_digits_to_a_common_offset(dtype, offset, spread):
    random = torch.Generator().manual_seed(0)
    logits = (spread * (torch.rand(16, 50, generator=random) - 0.5) + offset).to(dtype)
    z = standardize(logits)
    assert z.dtype == torch.float32
    assert_close(z.double(), standardize(logits.double()), rtol=1e-6, atol=1e-6, equal_nan=False)


def test_standardize_the_largest_and_the_smallest_numbers():
    row = torch.tensor([[1.0, 2.0, 6.0]])
    for scale in (1e-36, 1e37):
        assert_close(standardize(scale * row), standardize(row))


def test_standardize_leaves_excluded_classes_out():
    logits = torch.tensor([[1.0, -inf, 2.0, 6.0], [-inf, -inf, 4.0, -inf], [-inf] * 4]).requires_grad_()
    z = standardize(logits)
    assert_close(z[0, [0, 2, 3]], standardize(logits[0, [0, 2, 3]]))
    assert z.isinf().tolist() == logits.isinf().tolist()
    assert z[1, 2] == 0
    (result,) = torch.autograd.grad(z[logits.isfinite()].square().sum() + z[0, 0], logits)
    assert result.isfinite().all()
    assert (result[logits.isinf()] == 0).all()


def test_standardize_constant_rows_and_single_classes():
    for logits in (torch.full((2, 5), 1e4), torch.zeros(2, 1), torch.full((2, 3), -2.5, dtype=torch.float16)):
        logits.requires_grad_()
        z = standardize(logits)
        assert (z == 0).all()
        assert (torch.autograd.grad((z + z.exp()).sum(), logits)[0] == 0).all()


@pytest.mark.parametrize("junk", [nan, inf])
def test_standardize_keeps_nan_in_its_row_and_hands_no_gradient_on(junk):
    logits = torch.tensor([[1.0, 2.0, 6.0], [1.0, junk, 0.0]]).requires_grad_()
    z = standardize(logits)
    assert z[1].isnan().all()
    (result,) = torch.autograd.grad(z.square().sum() + z[0, 0], logits)
    assert result.isfinite().all()
    assert result[0].abs().max() > 0
    assert (result[1] == 0).all()


def test_standardize_refuses():
    with pytest.raises(TypeError, match=r"`logits`.*list"):
        standardize([1.0, 2.0])
    with pytest.raises(TypeError, match="floating dtype"):
        standardize(torch.zeros(2, 3, dtype=torch.long))
    with pytest.raises(ValueError, match="`class_dim`"):
        standardize(torch.zeros(2, 3), class_dim=2)


# Any loss on standardized logits


def test_the_golden_value_of_logit_standardization():
    loss = Standardized(KDLoss(temperature=2.0))
    result = loss(torch.tensor(S, dtype=torch.float64), torch.tensor(T, dtype=torch.float64))

    def kd(beside):
        def z(row):
            return [(x - statistics.fmean(row)) / (statistics.stdev(row) + beside) for x in row]

        return statistics.fmean(formulas.kd(z(s), z(t), 2.0) for s, t in zip(S, T, strict=True))

    assert result.item() == pytest.approx(kd(0), rel=1e-12)
    assert kd(1e-7) == digits(0.836820)  # what the authors add to the deviation is the last digit
    assert result.item() == pytest.approx(0.836820, abs=1e-6)


def of(case, **more):
    """The case's loss on standardized logits."""
    return Standardized(case.loss.module(**{**case.options, **more}))


def by_hand(x):
    return (x - x.mean(-1, keepdim=True)) / x.std(-1, keepdim=True)


def test_any_loss_can_be_standardized(default):
    student, teacher, target = batch(5, classes=6)
    target[1], target[3] = IGNORED, UNLABELLED
    weight = torch.tensor([1.0, 1.0, 2.0, 1.0, 0.5], dtype=torch.float64)
    for reduction in ("mean", "none"):
        result = of(default, reduction=reduction)(student, teacher, target, weight)
        expected = default(by_hand(student), by_hand(teacher), target, row_weight=weight, reduction=reduction)
        assert_close(result, expected, rtol=1e-9, atol=1e-12)


def test_standardized_losses_see_no_scale_and_no_offset(default):
    student, teacher, target = batch(5, classes=6)
    loss = of(default)
    expected = loss(student, teacher, target)
    assert_close(loss(3 * student + 100, teacher / 7 - 5, target), expected, rtol=1e-7, atol=1e-10)
    itself = student.clone().requires_grad_()
    (result,) = torch.autograd.grad(loss(itself, teacher, target), itself)
    size = float(result.abs().max())
    for along in (torch.ones_like(student), student):
        assert_close((result * along).sum(-1), torch.zeros(5).double(), rtol=0, atol=1e-9 * (1 + size))


@pytest.mark.parametrize("junk", [nan, -inf, 1e38])
def test_what_stands_in_an_ignored_row_does_not_matter_standardized(default, junk):
    student, teacher, target = batch(4, dtype=torch.float32)
    target[1] = IGNORED
    loss = of(default)

    def value_and_gradient(s, t):
        s = s.clone().requires_grad_()
        result = loss(s, t, target)
        return result, torch.autograd.grad(result, s)[0]

    expected = value_and_gradient(student, teacher)
    student[1], teacher[1] = junk, junk
    assert_close(value_and_gradient(student, teacher), expected)


def test_standardized_impossible_classes_change_nothing(default):
    student, teacher, target = batch(4)
    places = torch.tensor([1, 3, 4, 7, 8])
    nowhere = torch.full((4, 9), -inf, dtype=torch.float64)
    wide = [nowhere.index_copy(1, places, x) for x in (student, teacher)]
    loss = of(default)
    assert_close(loss(*wide, places[target]), loss(student, teacher, target), rtol=1e-10, atol=1e-12)


def test_standardized_constant_rows_have_no_gradient(default):
    student, teacher, target = batch(4)
    student[1], teacher[2] = 3.0, 3.0
    student.requires_grad_()
    result = of(default)(student, teacher, target)
    assert result.isfinite()
    (result,) = torch.autograd.grad(result, student)
    assert result.isfinite().all()
    assert (result[1] == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_standardized_16_bit_logits(default, dtype):
    student, teacher, target = batch(6, dtype=dtype)
    loss = of(default)
    assert_close(
        loss(student, teacher, target).double(),
        loss(student.double(), teacher.double(), target),
        rtol=1e-5,
        atol=1e-5,
    )


def test_a_standardized_loss_is_asked_what_its_loss_is_asked():
    class Asked(LogitLoss):
        needs_preparation = True
        function = staticmethod(luce.kd_loss)

        def prepare(self, teacher_logits, target):
            self.prepared = teacher_logits, target
            return {"found": 3.0}

        def set_epoch(self, epoch):
            self.epoch = epoch

    inner = Asked(class_dim=-1, reduction="sum", ignore_index=-7)
    loss = Standardized(inner)
    assert (loss.class_dim, loss.reduction, loss.ignore_index) == (-1, "sum", -7)
    assert loss.options() == inner.options()
    for wrapped in (loss, WeightedSum({"kd": (1.0, loss)}), LogitMethod(WeightedSum({"kd": (1.0, loss)}))):
        inner.prepared, inner.epoch = None, None
        assert wrapped.needs_preparation
        _, teacher, target = batch(5)
        if isinstance(wrapped, LogitMethod):  # which asks the teacher itself
            parts = zip(teacher.split(2), target.split(2), strict=True)
            batches = iter([{"input": part, "target": labels} for part, labels in parts])
            rows = SimpleNamespace(batches=batches.__iter__)
            found = wrapped.prepare(LiveTeacher(nn.Identity()), rows)
        else:
            found = wrapped.prepare(teacher, target)
        assert found == {"found" if wrapped is loss else "kd.found": 3.0}
        assert_close(inner.prepared[0], by_hand(teacher))
        assert torch.equal(inner.prepared[1], target)
        wrapped.set_epoch(3)
        assert inner.epoch == 3


def test_the_temperature_that_pld_takes_from_its_teacher_is_that_of_the_standardized_teacher():
    student, teacher, target = batch(50)
    loss = Standardized(PLDLoss(teacher_temperature="auto"))
    assert loss.needs_preparation
    temperature = luce.suggest_temperature(by_hand(teacher))
    assert loss.prepare(teacher, target) == pytest.approx({"teacher_temperature": temperature})
    expected = luce.pld_loss(by_hand(student), by_hand(teacher), target, teacher_temperature=temperature)
    assert_close(loss(student, teacher, target), expected, rtol=1e-5, atol=0)


def test_what_a_standardized_loss_needs():
    for inner in (KDLoss(), luce.DKDLoss(), CrossEntropyLoss(), luce.TfKDLoss()):
        loss = Standardized(inner)
        for name in ("takes_teacher", "uses_unlabelled", "needs_preparation"):
            assert getattr(loss, name) is getattr(inner, name), name
        method = LogitMethod(WeightedSum({"term": (1.0, loss)}))
        assert method.needs_teacher is inner.takes_teacher
        assert method.uses_unlabelled is inner.uses_unlabelled
    student, _, target = batch(4)
    result = Standardized(CrossEntropyLoss())(student, None, target)
    assert_close(result, luce.cross_entropy_loss(by_hand(student), target))


def test_one_step_of_a_standardized_term_beside_cross_entropy():
    kd = Standardized(KDLoss(temperature=2.0))
    loss = WeightedSum({"task": (0.1, CrossEntropyLoss()), "kd": (9.0, kd)})
    student = nn.Linear(3, 4)
    data = {"input": torch.randn(6, 3), "target": torch.arange(6) % 4, "index": torch.arange(6)}
    teacher = torch.randn(6, 4)
    terms = LogitMethod(loss).step(student, data, DenseSignal(teacher))
    logits = student(data["input"])
    assert_close(terms["task"], 0.1 * nn.functional.cross_entropy(logits, data["target"]))
    assert_close(terms["kd"], 9 * luce.kd_loss(by_hand(logits), by_hand(teacher), temperature=2.0))


def test_a_standardized_loss_along_the_last_dimension():
    student, teacher, target = batch(2, 3)
    loss = Standardized(PLDLoss(class_dim=-1))
    expected = Standardized(PLDLoss())(student.movedim(-1, 1), teacher.movedim(-1, 1), target)
    assert_close(loss(student, teacher, target), expected)


def test_a_standardized_loss_survives_copies_and_tells_what_it_is():
    student, teacher, target = batch(4)
    loss = Standardized(KDLoss(temperature=2.0), unbiased=False)
    expected = loss(student, teacher, target)
    assert expected != Standardized(KDLoss(temperature=2.0))(student, teacher, target)
    for twin in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert_close(twin(student, teacher, target), expected, rtol=0, atol=0)
    for part in ("Standardized", "unbiased=False", "KDLoss(temperature=2.0)"):
        assert part in repr(loss)
    assert not loss.state_dict()


@pytest.mark.parametrize(
    "wrong",
    [luce.kd_loss, nn.MSELoss(), WeightedSum({"kd": (1.0, KDLoss())})],
    ids=["function", "module", "sum"],
)
def test_what_cannot_be_standardized(wrong):
    with pytest.raises(TypeError, match=r"`loss`.*LogitLoss.*standardize its terms"):
        Standardized(wrong)


def test_errors_pass_through_a_standardized_loss():
    student, teacher, target = batch(3)
    loss = Standardized(luce.DKDLoss())
    with pytest.raises(ValueError, match="`teacher_logits`"):
        loss(student, teacher[:2], target)
    with pytest.raises(TypeError, match=r"`teacher_logits`.*NoneType"):
        loss(student, None, target)
    with pytest.raises(ValueError, match="labels in"):
        loss(student, teacher, target + 5)


@pytest.mark.parametrize("inner", [KDLoss(temperature=2.0), PLDLoss()], ids=repr)
def test_a_standardized_loss_under_compile(inner):
    torch.compiler.reset()
    student, teacher, target = batch(6, dtype=torch.float32)
    target[0], student[0] = IGNORED, nan
    loss = Standardized(inner)
    results = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        s = student.clone().requires_grad_()
        result = function(s, teacher, target)
        results.append((result, torch.autograd.grad(result, s)[0]))
    assert_close(results[1], results[0])


def test_labels_of_the_golden_batch_do_not_matter_to_standardized_kd():
    student, teacher = (torch.tensor(x, dtype=torch.float64) for x in (S, T))
    loss = Standardized(KDLoss())
    assert_close(loss(student, teacher, torch.tensor(Y)), loss(student, teacher), rtol=0, atol=0)
