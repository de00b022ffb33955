"""RKKD in Triton: against float64, and the contract of the operator."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch.testing import assert_close

import luce
from luce.ops import engines
from luce.ops.rkkd import FORMS, rkkd

pytestmark = [] if engines.INTERPRETED else [pytest.mark.gpu]

every_form = pytest.mark.parametrize("form", FORMS[:4])
inf, nan = math.inf, math.nan
ROUNDING = {torch.bfloat16: 8e-3 if engines.INTERPRETED else 4e-3, torch.float16: 1e-3}
"""A unit in the last place of a 16-bit gradient. The interpreter truncates bfloat16 instead of rounding."""


@pytest.fixture
def small(monkeypatch):
    """Programs compare two classes with four at a time."""
    from luce.ops.rkkd import triton

    monkeypatch.setattr(triton, "WIDTH", 4)
    monkeypatch.setattr(triton, "PAIRS", 8)


def batch(*shape, dtype=torch.float64, spread=1.0, device="cpu"):
    return (spread * torch.randn(2, *shape, dtype=torch.float64)).to(dtype).to(device)


def value_and_gradient(student, teacher, upstream=None, backend="gpu", **options):
    student = student.detach().requires_grad_()
    values = rkkd(student, teacher, backend=backend, **options)
    upstream = torch.ones_like(values) if upstream is None else upstream
    return values.detach(), torch.autograd.grad(values, student, upstream)[0]


def agree(student, teacher, *, budget=2e-6, faint=0.0, **options):
    """With the reference in float64: values, and the gradient over its largest entry in a row."""
    values, gradient = value_and_gradient(student, teacher, **options)
    truth, slope = value_and_gradient(student.double(), teacher.double(), backend="reference", **options)
    assert values.dtype == torch.promote_types(
        torch.promote_types(student.dtype, teacher.dtype), torch.float32
    )
    assert gradient.dtype == student.dtype
    assert_close(values.double(), truth, rtol=budget, atol=1e-15)
    allowed = (budget + ROUNDING.get(gradient.dtype, 0)) * slope.abs().amax(1, keepdim=True)
    assert ((gradient.double() - slope).abs() <= allowed + faint + 1e-15).all()
    return values, gradient


@every_form
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_against_float64(dtype, form, small, device):
    agree(
        *batch(2, 9, dtype=dtype, device=device),
        form=form,
        steepness=1.5,
        budget=1e-12 if dtype == torch.float64 else 2e-6,
    )


@pytest.mark.parametrize("form", ["tanh", "clip"])
def test_the_sizes_that_programs_have(form, device):
    """More classes than a program looks at at a time, and networks of two dtypes."""
    student, teacher = batch(1, 131, dtype=torch.float32, device=device)
    agree(student, teacher.half(), form=form)


@every_form
@pytest.mark.parametrize("spread", [1e-3, 50.0, 1e4])
def test_every_spread_and_steepness(spread, form, device):
    for k in (0.01, 1.0, 100.0):
        student, teacher = batch(4, 11, spread=spread, dtype=torch.float32, device=device)
        teacher += student
        student[0, 3], teacher[0, 4] = student[0, 6], teacher[0, 5]
        # A slope of e^-20 stems from a difference of logits that both have their own rounding behind them.
        agree(student, teacher, form=form, steepness=k, faint=2e-12 * k * max(1.0, spread))


def test_small_differences_keep_their_digits(device):
    """tanh of a small number, as 1 - e^-x, cancels in a careless float32."""
    student, teacher = batch(4, 20, dtype=torch.float32, device=device)
    agree(student, 1e-5 * teacher)
    student = 20 * student.sort().values
    values, _ = value_and_gradient(student, student)  # 1 - tanh^2, a sum of next to nothing
    pairs = (student[:, :, None].double() - student[:, None].double()).cosh() ** -2
    expected = pairs.triu(1).sum((1, 2)) / 190
    assert_close(values.double(), expected, rtol=2e-6, atol=0)


@every_form
def test_steep_is_kendall(form, device):
    """However steep: one minus the share of pairs that agree, less that of those that do not."""
    student, teacher = batch(3, 9, dtype=torch.float32, device=device)
    student[0, 2] = student[0, 5]
    sign = [(x[:, :, None] - x[:, None]).sign() for x in (student, teacher)]
    expected = 1 - (sign[0] * sign[1]).sum((1, 2)) / 72
    for k in (1e9, 1e300):
        values, gradient = value_and_gradient(student, teacher, form=form, steepness=k)
        assert_close(values, expected)
        assert (gradient[1:] == 0).all()
    if form != "product":  # also where the product of two differences is 0 in float32
        assert_close(
            rkkd(1e-30 * student, 1e-30 * teacher, form=form, steepness=1e36, backend="gpu"), expected
        )
    *_, gradient = value_and_gradient(student.double(), teacher.double(), form=form, steepness=1e100)
    _, slope = value_and_gradient(
        student.double(), teacher.double(), form=form, steepness=1e100, backend="reference"
    )
    assert_close(gradient, slope, rtol=1e-12, atol=0)


@every_form
def test_classes_that_are_excluded(form, device):
    """By both networks, by one of them, and in rows with no more than one class."""
    which = itertools.combinations_with_replacement([(0, 0), (0, 1), (1, 0), (1, 1)], 3)
    excluded = torch.tensor(list(which), device=device).bool().movedim(-1, 0)
    student, teacher = torch.where(excluded, -inf, torch.randn(excluded.shape, device=device))
    values, gradient = value_and_gradient(student, teacher, form=form)
    expected, slope = value_and_gradient(student.double(), teacher.double(), form=form, backend="reference")
    assert_close(values.double(), expected, rtol=1e-6, atol=1e-7)
    assert_close(gradient.double(), slope, rtol=1e-6, atol=1e-7)


@every_form
def test_nan_and_infinity_spoil_their_row_and_no_other(form, small, device):
    student, teacher = batch(6, 5, dtype=torch.float32, device=device)
    expected, slope = value_and_gradient(student, teacher, form=form)
    student[1, 0] = teacher[2, 4] = nan
    student[3, 4] = teacher[4, 0] = inf
    values, gradient = value_and_gradient(student, teacher, form=form)
    assert values.isnan().tolist() == [False, True, True, True, True, False]
    assert gradient.isnan().all(1).tolist() == values.isnan().tolist()
    assert_close(values[[0, 5]], expected[[0, 5]], rtol=0, atol=0)
    assert_close(gradient[[0, 5]], slope[[0, 5]], rtol=0, atol=0)


@every_form
def test_the_largest_finite_values(form, device):
    largest = torch.finfo(torch.float32).max
    student = torch.tensor([[largest, -largest, 0.0]], device=device)
    for teacher, loss in ((student, 0), (-student, 2)):
        values, gradient = value_and_gradient(student, teacher, form=form)
        assert values == loss
        assert (gradient == 0).all()


def test_weights(device):
    student, teacher = batch(5, 6, dtype=torch.float32, device=device)
    weight = torch.tensor([1.0, 0.25, 0.0, -2.0, nan], device=device)
    values, gradient = value_and_gradient(student, teacher)
    student[2] = nan
    some = value_and_gradient(student, teacher, weight=weight)
    kept = [0, 1, 3]
    assert_close(some[0][kept], (weight * values)[kept])
    assert_close(some[1][kept], (weight[:, None] * gradient)[kept])
    assert some[0][2] == 0
    assert (some[1][2] == 0).all()
    assert some[0][4].isnan()
    assert some[1][4].isnan().all()


@pytest.mark.parametrize("shape", [(3, 5), (2, 5, 2), (0, 5), (2, 5, 0)], ids=str)
def test_blocks_of_any_strides(shape, small, device):
    student, teacher = batch(*shape, dtype=torch.float32, device=device)
    weight = torch.rand(shape[:1] + shape[2:], device=device)
    for change in (
        lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
        lambda x: torch.stack([x, torch.full_like(x, nan)], -1)[..., 0],
        lambda x: x[:1].expand(shape) if len(x) else x,
    ):
        values, _ = agree(change(student), change(teacher), weight=weight)
        assert values.shape == weight.shape


def test_derivatives(device):
    student, teacher = batch(1, 3, device=device)
    student.requires_grad_()

    def run(s):
        return rkkd(s, teacher, backend="gpu")

    torch.autograd.gradcheck(run, student)
    torch.autograd.gradgradcheck(run, student)
    student, teacher = batch(2, 4, device=device)
    agree(
        student, teacher, upstream=torch.tensor([2.0, -1.0], dtype=torch.float64, device=device), budget=1e-12
    )


def test_what_the_operator_refuses(device):
    x = torch.zeros(3, 4, device=device)
    for arguments in ((x[:, :3], None, 0, 1.0), (x, None, 4, 1.0), (x, None, 0, -1.0), (x, x[0, :2], 0, 1.0)):
        with pytest.raises(RuntimeError, match="expected"):
            torch.ops.luce.rkkd(x, *arguments, True)


def test_the_loss_takes_the_kernel(device):
    student, teacher = batch(4, 5, 2, dtype=torch.float32, device=device)
    for form in ("tanh", "sigmoid"):
        found = []
        for backend in ("gpu", "reference"):
            x = student.detach().requires_grad_()
            value = luce.rkkd_loss(x, teacher, form=form, backend=backend)
            (3 * value).backward()
            found.append((value.detach(), x.grad))
        assert_close(found[0], found[1])
