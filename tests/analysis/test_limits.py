"""KD on its way to logit matching: golden values, the rate, and what holds at every temperature."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import luce
from luce.analysis.limits import limits

Z = torch.tensor([[2.0, -0.5, 0.5, 1.0]], dtype=torch.float64)
UNEQUAL = torch.tensor([[4.0, 1.0, -1.0, 2.0]], dtype=torch.float64)
EQUAL = torch.tensor([[3.0, 1.0, -1.0, 0.0]], dtype=torch.float64)


def gradient(loss, student: Tensor) -> Tensor:
    student = student.clone().requires_grad_()
    return torch.autograd.grad(loss(student), student)[0]


def kd_gradient(temperature: float, student: Tensor = Z, teacher: Tensor = UNEQUAL) -> Tensor:
    return gradient(lambda z: luce.kd_loss(z, teacher, temperature=temperature, reduction="sum"), student)


# Golden values ----------------------------------------------------------------------------------------------


def test_unequal_means_by_hand() -> None:
    found = limits(Z, UNEQUAL)
    # z - v = -2, -1.5, 1.5, -1, whose mean is -0.75; a and b are z and v less 0.75 and 1.5.
    assert found.matching == pytest.approx((4 + 2.25 + 2.25 + 1) / 8)
    assert found.regularization == pytest.approx(-0.5 * 0.75**2)
    assert found.limit == pytest.approx((1.25**2 + 0.75**2 + 2.25**2 + 0.25**2) / 8)
    assert (found.matching, found.regularization, found.limit) == (1.1875, -0.28125, 0.90625)
    a, b = [1.25, -1.25, -0.25, 0.25], [2.5, -0.5, -2.5, 0.5]
    c1 = sum(x**3 / 6 + y**3 / 3 - x * y**2 / 2 for x, y in zip(a, b, strict=True)) / 4
    assert found.c1 == pytest.approx(c1)
    assert c1 == pytest.approx(-0.75)
    assert found.mean_gap == -0.75
    assert found.mean_gap_deviation == 0


def test_equal_means_by_hand() -> None:
    found = limits(Z, EQUAL)
    assert found.matching == found.limit == 0.8125
    assert found.regularization == found.mean_gap == 0
    assert found.c1 == pytest.approx(-0.234375)
    for point in found.sweep:
        assert point.cosine_limit == pytest.approx(point.cosine_matching)
    assert found.matching_gradient_sum == pytest.approx(0, abs=1e-15)


@pytest.mark.parametrize(
    ("temperature", "kd", "remainder", "gradients"),
    [
        (1, 0.184937, -0.721313, [-0.241330, 0.007289, 0.127710, 0.106330]),
        (4, 0.689045, -0.868820, [-0.358312, -0.085432, 0.431481, 0.012263]),
        (10, 0.825082, -0.811683, [-0.337085, -0.142555, 0.512682, -0.033041]),
        (100, 0.898680, -0.756953, [-0.315280, -0.182828, 0.557779, -0.059671]),
        (1000, 0.905499, -0.750702, [-0.312781, -0.187031, 0.562031, -0.062219]),
    ],
)
def test_the_golden_table(temperature: float, kd: float, remainder: float, gradients: list[float]) -> None:
    found = limits(Z, UNEQUAL, temperature=temperature).chosen
    assert found.kd == pytest.approx(kd, abs=5.1e-7)
    # T² KL rounds at T² times the last digit: at 1000 the table's own last digit is not certain.
    assert temperature * found.remainder == pytest.approx(remainder, abs=1e-6)
    assert found.distance == pytest.approx(-found.remainder / 0.90625)
    assert found.predicted == pytest.approx(0.90625 - 0.75 / temperature)
    torch.testing.assert_close(
        kd_gradient(temperature)[0], torch.tensor(gradients).double(), atol=5.1e-7, rtol=0
    )
    limit = torch.tensor([-0.3125, -0.1875, 0.5625, -0.0625]).double()
    matching = torch.tensor([-0.5, -0.375, 0.375, -0.25]).double()
    of = kd_gradient(temperature)[0]
    assert found.cosine_limit == pytest.approx((of @ limit / of.norm() / limit.norm()).item())
    assert found.cosine_matching == pytest.approx((of @ matching / of.norm() / matching.norm()).item())


@pytest.mark.parametrize(
    ("temperature", "kd"), [(1, 0.264931), (4, 0.716458), (10, 0.782907), (100, 0.810095), (1000, 0.812265)]
)
def test_the_golden_table_with_equal_means(temperature: float, kd: float) -> None:
    assert limits(Z, EQUAL, temperature=temperature).chosen.kd == pytest.approx(kd, abs=5.1e-7)


# Claims -----------------------------------------------------------------------------------------------------


def batch(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    student, teacher = 2 * torch.randn(2, 7, 6, dtype=torch.float64, generator=random)
    return student, teacher + 0.7, torch.randint(6, (7,), generator=random)


LOSSES = {
    "cross-entropy": luce.CrossEntropyLoss(reduction="sum"),
    "label smoothing": luce.CrossEntropyLoss(label_smoothing=0.2, reduction="sum"),
    **{f"KD at {t}": luce.KDLoss(temperature=t, reduction="sum") for t in (1.0, 4.0, 20.0)},
    "mixture": luce.WeightedSum(
        {
            "ce": (0.3, luce.CrossEntropyLoss(reduction="sum")),
            "kd": (0.7, luce.KDLoss(temperature=4.0, reduction="sum")),
        }
    ),
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_gradients_have_mean_zero_and_offsets_do_not_matter(
    name: str, dtype: torch.dtype, tolerance: float
) -> None:
    student, teacher, target = batch()

    def loss(z: Tensor) -> Tensor:
        value = LOSSES[name](z, teacher.to(dtype), target)
        return value if isinstance(value, Tensor) else value["loss"]

    found = gradient(loss, student.to(dtype))
    assert (found.sum(-1).abs() <= tolerance * found.abs().sum(-1)).all()
    assert loss(student.to(dtype) + 3).item() == pytest.approx(
        loss(student.to(dtype)).item(), rel=10 * tolerance
    )


def test_logit_matching_has_neither() -> None:
    student, teacher, _ = batch()
    found = gradient(lambda z: 0.5 * luce.logit_matching_loss(z, teacher, reduction="sum"), student)
    torch.testing.assert_close(found.sum(-1), student.mean(-1) - teacher.mean(-1))
    assert limits(student, teacher).matching_gradient_sum > 0.1
    assert max(point.gradient_sum for point in limits(student, teacher).sweep) < 1e-12
    plain, moved = (luce.logit_matching_loss(s, teacher).item() for s in (student, student + 1))
    assert abs(plain - moved) > 0.1


def test_the_remainder_falls_as_one_over_the_temperature() -> None:
    student, teacher, _ = batch()
    low, high = limits(student, teacher, temperatures=(1e2, 1e4)).sweep
    slope = math.log(abs(high.remainder / low.remainder)) / math.log(100)
    assert slope == pytest.approx(-1, abs=0.05)
    found = limits(student, teacher)
    assert 1e4 * high.remainder == pytest.approx(found.c1, rel=1e-2)
    assert high.kd == pytest.approx(high.predicted, rel=1e-6)


def test_the_gradients_remainder_is_the_predicted_one() -> None:
    # (a_i² - <a²>) - (b_i² - <b²>) over 2 C T, with a, b of the golden example
    a, b = Z - Z.mean(), UNEQUAL - UNEQUAL.mean()
    coefficient = (a**2 - (a**2).mean() - b**2 + (b**2).mean()) / 8
    torch.testing.assert_close(
        coefficient, torch.tensor([[-0.28125, 0.46875, -0.46875, 0.28125]], dtype=torch.float64)
    )
    off = 1e4 * (kd_gradient(1e4) - (a - b) / 4)
    torch.testing.assert_close(off, coefficient, atol=1e-3, rtol=0)


def test_the_regularization_is_the_difference_and_at_most_zero() -> None:
    student, teacher, _ = batch()
    found = limits(student, teacher)
    assert found.limit - found.matching == pytest.approx(found.regularization, rel=1e-12)
    assert found.regularization < 0
    gap = student.mean(-1) - teacher.mean(-1)
    assert found.regularization == pytest.approx(-0.5 * gap.square().mean().item())
    assert found.mean_gap == pytest.approx(gap.mean().item())
    assert found.mean_gap_deviation == pytest.approx(gap.std(correction=0).item())
    # The gradients of the limit and of logit matching differ by the same on every class.
    matching = gradient(lambda z: 0.5 * luce.logit_matching_loss(z, teacher, reduction="sum"), student)
    a, b = (x - x.mean(-1, keepdim=True) for x in (student, teacher))
    torch.testing.assert_close(matching - (a - b) / 6, (gap / 6)[:, None].expand(-1, 6))


def test_with_equal_means_the_limit_is_logit_matching() -> None:
    student, teacher, _ = batch()
    centred = teacher - teacher.mean(-1, keepdim=True) + student.mean(-1, keepdim=True)
    found = limits(student, centred, temperature=1e6)
    assert found.limit == pytest.approx(found.matching, rel=1e-12)
    assert found.regularization == pytest.approx(0, abs=1e-30)
    assert found.chosen.cosine_matching == pytest.approx(1, abs=1e-9)


def train_step(loss, steps: int = 200) -> Tensor:
    z = Z.clone()
    for _ in range(steps):
        z -= gradient(loss, z)
    return z


def test_descent_ends_at_the_teacher_but_for_the_means() -> None:
    matching = train_step(lambda z: 0.5 * luce.logit_matching_loss(z, UNEQUAL))
    kd = train_step(lambda z: luce.kd_loss(z, UNEQUAL, temperature=1e4))
    torch.testing.assert_close(matching, UNEQUAL, atol=1e-9, rtol=0)
    torch.testing.assert_close(kd, UNEQUAL - 0.75, atol=1e-9, rtol=0)
    shifted = train_step(lambda z: 0.5 * luce.logit_matching_loss(z, UNEQUAL - 0.75))
    torch.testing.assert_close(kd, shifted, atol=1e-9, rtol=0)


# The report -------------------------------------------------------------------------------------------------


def test_rows_are_averaged() -> None:
    student, teacher, _ = batch()
    found, single = (
        limits(student, teacher),
        [limits(s[None], t[None]) for s, t in zip(student, teacher, strict=True)],
    )
    for name in ("matching", "regularization", "limit", "c1", "mean_gap"):
        assert getattr(found, name) == pytest.approx(sum(getattr(one, name) for one in single) / 7)
    assert found.chosen.kd == pytest.approx(sum(one.chosen.kd for one in single) / 7)
    assert found.rows == 7


def test_the_verdict_tells_how_far() -> None:
    assert limits(Z, UNEQUAL, temperature=100).verdict.startswith(
        "At T = 100 KD differs by 0.8% from its limit at infinite temperature; "
        "the cosine of their gradients is 1.0000."
    )
    near = limits(Z, UNEQUAL, temperature=1).verdict
    assert "differs by 79.6%" in near


@pytest.mark.parametrize("offset", [0.0, 0.1])
def test_networks_that_agree_have_no_distance(offset: float) -> None:
    found = limits(Z, Z + offset)
    assert found.limit == 0
    assert found.chosen.distance is found.chosen.cosine_limit is None
    assert found.verdict.startswith("The logits of student and teacher agree up to a constant")
    assert found.mean_gap == pytest.approx(-offset)


@pytest.mark.parametrize(
    ("student", "teacher", "options", "reason"),
    [
        (Z, UNEQUAL[:, :3], {}, "`teacher_logits` of shape"),
        (Z[0], UNEQUAL[0], {}, "(N, C)"),
        (Z[:, :1], Z[:, :1], {}, "at least 1 row and 2 classes"),
        (Z, UNEQUAL * math.inf, {}, "finite `teacher_logits`"),
        (Z * math.nan, UNEQUAL, {}, "finite `student_logits`"),
        (Z, UNEQUAL, {"temperature": 0.0}, "`temperature`"),
        (Z, UNEQUAL, {"temperatures": (1.0, -1.0)}, "`temperature`"),
    ],
)
def test_errors(student: Tensor, teacher: Tensor, options: dict[str, object], reason: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        limits(student, teacher, **options)
    assert reason in str(caught.value)
