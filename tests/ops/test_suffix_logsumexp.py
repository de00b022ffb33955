"""Log-sum-exp of every suffix, against SciPy on each of them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.special
import torch
from torch.testing import assert_close

from luce.ops.suffix_logsumexp import suffix_logsumexp

inf = math.inf


def by_scipy(x: torch.Tensor) -> torch.Tensor:
    x = x.double().numpy()
    with np.errstate(divide="ignore"):
        columns = [scipy.special.logsumexp(x[..., k:], axis=-1) for k in range(x.shape[-1])]
    return torch.from_numpy(np.stack(columns, axis=-1))


def gradient_by_softmax(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Of the weighted sum of all suffixes: each is a softmax over its classes."""
    total = torch.zeros_like(x)
    for k in range(x.shape[-1]):
        share = x[..., k:].softmax(-1).nan_to_num(0)  # an empty suffix has no share
        total[..., k:] += weight[..., k, None] * share
    return total


@pytest.mark.parametrize("spread", [1.0, 50.0, 1e3, 1e4])
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-13), (torch.float32, 1e-6)])
def test_values(spread, dtype, rtol):
    x = (spread * torch.randn(4, 33, dtype=torch.float64)).to(dtype)
    result = suffix_logsumexp(x)
    assert result.dtype == dtype
    assert_close(result.double(), by_scipy(x), rtol=rtol, atol=rtol * spread)


@pytest.mark.parametrize("spread", [1.0, 50.0, 1e3])
def test_gradient(spread):
    x = (spread * torch.randn(3, 17, dtype=torch.float64)).requires_grad_()
    weight = torch.randn(3, 17, dtype=torch.float64)
    (gradient,) = torch.autograd.grad((weight * suffix_logsumexp(x)).sum(), x)
    assert_close(gradient, gradient_by_softmax(x.detach(), weight), rtol=1e-9, atol=1e-11)


def test_gradcheck():
    x = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(suffix_logsumexp, x)
    assert torch.autograd.gradgradcheck(suffix_logsumexp, x)


@pytest.mark.parametrize(
    "row",
    [
        [0.5, -inf, 1.0, -inf, -inf, 2.0],
        [0.5, 1.0, 2.0, -inf, -inf, -inf],
        [-inf, -inf, -inf, 0.5, 1.0, 2.0],
        [-inf] * 6,
        [1e4, -inf, -1e4, -inf, -inf, -inf],
    ],
    ids=["between", "behind", "in front", "nothing else", "wide"],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_runs_of_minus_infinity(row, dtype):
    x = torch.tensor([row], dtype=dtype, requires_grad=True)
    result = suffix_logsumexp(x)
    assert_close(result.detach().double(), by_scipy(x.detach()), rtol=1e-6, atol=0)
    kept = torch.where(result.isinf(), 0, result)
    (gradient,) = torch.autograd.grad(kept.sum(), x)
    expected = gradient_by_softmax(x.detach().double(), torch.ones(1, 6, dtype=torch.float64))
    assert_close(gradient.double(), expected, rtol=1e-3 if max(row) > 1e3 else 1e-6, atol=1e-7)
    assert torch.autograd.grad(suffix_logsumexp(x).sum(), x)[0].isfinite().all()


def test_an_early_giant_does_not_drown_the_rest():
    x = torch.tensor([1e4, 0.0, 0.0, 0.0])
    assert_close(suffix_logsumexp(x), torch.tensor([1e4, math.log(3), math.log(2), 0.0]))


def test_nan_reaches_the_suffixes_that_hold_it():
    result = suffix_logsumexp(torch.tensor([1.0, math.nan, 2.0, 3.0]))
    assert result.isnan().tolist() == [True, True, False, False]


def test_sixteen_bits():
    """Any finite value is one: only -inf is -inf."""
    dtype = torch.bfloat16
    x = torch.tensor([0.0, -1e4, -3e4, 1.0, -2e4], dtype=dtype)
    result = suffix_logsumexp(x)
    assert result.dtype == dtype
    assert_close(result.double(), by_scipy(x), rtol=2 * torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps)


@pytest.mark.parametrize("shape", [(5,), (2, 3, 5), (0, 5), (4, 1)])
def test_shapes(shape):
    x = torch.randn(shape, dtype=torch.float64)
    assert_close(suffix_logsumexp(x), by_scipy(x))


def test_strided_input():
    x = torch.randn(5, 4, dtype=torch.float64)
    assert_close(suffix_logsumexp(x.T), by_scipy(x.T.contiguous()))
    assert_close(suffix_logsumexp(x[:, ::2]), by_scipy(x[:, ::2].contiguous()))
