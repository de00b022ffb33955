"""Suffixes in Triton: against float64, and the contract of the operator."""

from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

from luce.ops import engines
from luce.ops.suffix_logsumexp import suffix_logsumexp

pytestmark = [] if engines.INTERPRETED else [pytest.mark.gpu]

inf, nan = math.inf, math.nan


@pytest.fixture(params=[False, True], ids=["one step", "several"])
def steps(request):
    """A row at once, or 16 places at a time."""
    if request.param:
        request.getfixturevalue("narrow")


def value_and_gradient(x, upstream=None, backend="gpu"):
    x = x.detach().requires_grad_()
    values = suffix_logsumexp(x, backend=backend)
    upstream = torch.ones_like(values) if upstream is None else upstream
    return values.detach(), torch.autograd.grad(values, x, upstream)[0]


def truth(x, upstream=None):
    """By one softmax a suffix, in float64."""
    x = x.double()
    upstream = torch.ones_like(x) if upstream is None else upstream.double()
    values, gradient = torch.empty_like(x), torch.zeros_like(x)
    for k in range(x.shape[-1]):
        values[..., k] = x[..., k:].logsumexp(-1)
        gradient[..., k:] += upstream[..., k, None] * x[..., k:].softmax(-1).nan_to_num(0)
    return values, gradient


def agree(x, upstream=None, budget=1e-6):
    """Values by their size, gradients by the row's largest."""
    values, gradient = value_and_gradient(x, upstream)
    expected, slope = truth(x, upstream)
    assert values.dtype == gradient.dtype == x.dtype
    eps = max(budget, torch.finfo(x.dtype).eps) if x.dtype.itemsize == 2 else budget
    assert_close(values.double(), expected, rtol=eps, atol=eps)
    assert ((gradient.double() - slope).abs() <= 2 * eps * slope.abs().amax(-1, keepdim=True)).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("length", [1, 35])
def test_against_float64(length, dtype, steps, device):
    x, upstream = torch.randn(2, 3, length, dtype=torch.float64).to(dtype).to(device)
    agree(3 * x, upstream, budget=1e-13 if dtype == torch.float64 else 1e-6)


@pytest.mark.parametrize("spread", [50.0, 1e4])
def test_every_spread_and_level(spread, narrow, device):
    level = torch.tensor([0, -2e4, 1e8], device=device)[:, None]
    x, upstream = torch.randn(2, 3, 35, device=device)
    agree(spread * x + level, upstream)
    agree(spread * x.sort(descending=True).values + level)


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_gradients_of_any_size_come_back(size, steps, device):
    x = torch.tensor([[0.0, 39.0, 5.0, -14.0] * 5], device=device)
    upstream = torch.randn(1, 20, device=device)
    assert_close(value_and_gradient(x, size * upstream)[1], size * value_and_gradient(x, upstream)[1])


def test_excluded_places_nan_and_infinity(steps, device):
    """Whatever it is, it stays in its row."""
    gap = [-inf] * 18
    rows = [
        [0.5, -inf, 1.0, *gap, 2.0],
        [0.5, 1.0, 2.0, *gap, -inf],
        [-inf, -inf, *gap, 1.0, 2.0],
        [-inf, -inf, *gap, -inf, -inf],
        [1e4, -1e4, *gap, -3e38, -inf],
        [1.0, 2.0, torch.finfo(torch.float32).min, *gap, -inf],
        [1.0, inf, 2.0, inf, *gap[3:], 0.0, 3.0, 1.0],
        [1.0, inf, nan, *gap, 3.0],
        [inf, 1.0, nan, *gap, inf],
    ]
    x = torch.tensor(rows, device=device)
    values, gradient = value_and_gradient(x)
    expected = suffix_logsumexp(x.double(), backend="reference")
    assert_close(values[:7].double(), expected[:7])
    assert values[7:].isnan().sum(-1).tolist() == [3, 3]
    assert values[7, 3:21].eq(3).all()
    assert values[8, 3:].eq(inf).all()
    slope = truth(x[:6])[1]
    assert_close(gradient[:6].double(), slope, rtol=1e-6, atol=1e-6)
    assert gradient[6].isnan().tolist() == (x[6] == inf).tolist()
    assert (gradient[6, [0, 2]] == 0).all()
    assert_close(gradient[6:7, 4:].double(), truth(x[6:7, 4:])[1], rtol=1e-6, atol=1e-6)
    assert gradient[7:].isnan().all()


def test_a_nan_that_comes_back_reaches_what_its_suffix_holds(steps, device):
    x, upstream = torch.zeros(2, 40, device=device), torch.zeros(2, 40, device=device)
    upstream[0, 20] = nan
    _, gradient = value_and_gradient(x, upstream)
    assert gradient.isnan().sum(-1).tolist() == [20, 0]
    assert gradient[0, 20:].isnan().all()


@pytest.mark.parametrize("shape", [(), (0, 5), (4, 0), (2, 3, 5)], ids=str)
def test_shapes(shape, device):
    x = torch.randn(shape, device=device)
    assert_close(suffix_logsumexp(x, backend="gpu"), suffix_logsumexp(x, backend="reference"))


def test_strided_rows(steps, device):
    x = torch.randn(18, 3, device=device)
    for rows in (x.T, x.T[:, ::2], x.T[:1].expand(2, 18)):
        agree(rows, torch.randn(rows.shape[::-1], device=device).T)


def test_a_long_row(narrow, device):
    """From equal logits, log(n - k) and 1/n + ... + 1/(n - j): sums of many terms."""
    n = 400
    x = torch.full((1, n), 3.0, device=device)
    values, gradient = value_and_gradient(x)
    left = n - torch.arange(n, dtype=torch.float64, device=device)
    assert_close(values[0].double(), 3 + left.log(), rtol=3e-7, atol=0)
    assert_close(gradient[0].double(), (1 / left).cumsum(0), rtol=1e-6, atol=0)


def test_derivatives(device):
    x = torch.randn(1, 3, dtype=torch.float64, device=device, requires_grad=True)
    torch.autograd.gradcheck(lambda x: suffix_logsumexp(x, backend="gpu"), x)
    torch.autograd.gradgradcheck(lambda x: suffix_logsumexp(x, backend="gpu"), x)


def test_what_the_operator_refuses(device):
    x = torch.randn(3, 5, device=device)
    for upstream in (x[:, :4], x[:2], x.reshape(-1), x.long()):
        with pytest.raises(RuntimeError, match="upstream"):
            torch.ops.luce.suffix_logsumexp_backward(upstream, x)
