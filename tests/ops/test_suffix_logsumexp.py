"""Log-sum-exp of every suffix, against SciPy on each of them."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
import scipy.special
import torch
from torch.testing import assert_close

from luce.ops.engines import WHY_NOT
from luce.ops.suffix_logsumexp import suffix_logsumexp as public

needs_native = pytest.mark.skipif(WHY_NOT is not None, reason=f"needs the native library: {WHY_NOT}")
native = functools.partial(public, backend="cpu")
SPREADS = [1.0, 50.0, 1e3, 1e4]


@pytest.fixture(params=["reference", pytest.param("cpu", marks=needs_native)])
def suffix_logsumexp(request):
    return functools.partial(public, backend=request.param)


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


@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-13), (torch.float32, 1e-6)])
def test_values(suffix_logsumexp, spread, dtype, rtol):
    x = (spread * torch.randn(4, 33, dtype=torch.float64)).to(dtype)
    result = suffix_logsumexp(x)
    assert result.dtype == dtype
    assert_close(result.double(), by_scipy(x), rtol=rtol, atol=rtol * spread)


@pytest.mark.parametrize("spread", [1.0, 50.0, 1e3])
def test_gradient(suffix_logsumexp, spread):
    x = (spread * torch.randn(3, 17, dtype=torch.float64)).requires_grad_()
    weight = torch.randn(3, 17, dtype=torch.float64)
    (gradient,) = torch.autograd.grad((weight * suffix_logsumexp(x)).sum(), x)
    assert_close(gradient, gradient_by_softmax(x.detach(), weight), rtol=1e-9, atol=1e-11)


def test_gradcheck(suffix_logsumexp):
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
def test_runs_of_minus_infinity(suffix_logsumexp, row, dtype):
    x = torch.tensor([row], dtype=dtype, requires_grad=True)
    result = suffix_logsumexp(x)
    assert_close(result.detach().double(), by_scipy(x.detach()), rtol=1e-6, atol=0)
    kept = torch.where(result.isinf(), 0, result)
    (gradient,) = torch.autograd.grad(kept.sum(), x)
    expected = gradient_by_softmax(x.detach().double(), torch.ones(1, 6, dtype=torch.float64))
    assert_close(gradient.double(), expected, rtol=1e-3 if max(row) > 1e3 else 1e-6, atol=1e-7)
    assert torch.autograd.grad(suffix_logsumexp(x).sum(), x)[0].isfinite().all()


def test_an_early_giant_does_not_drown_the_rest(suffix_logsumexp):
    x = torch.tensor([1e4, 0.0, 0.0, 0.0])
    assert_close(suffix_logsumexp(x), torch.tensor([1e4, math.log(3), math.log(2), 0.0]))


def test_nan_reaches_the_suffixes_that_hold_it(suffix_logsumexp):
    result = suffix_logsumexp(torch.tensor([1.0, math.nan, 2.0, 3.0]))
    assert result.isnan().tolist() == [True, True, False, False]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits(suffix_logsumexp, dtype):
    """Any finite value is one: only -inf is -inf."""
    x = torch.tensor([0.0, -1e4, -3e4, 1.0, -2e4], dtype=dtype, requires_grad=True)
    result = suffix_logsumexp(x)
    assert result.dtype == dtype
    eps = torch.finfo(dtype).eps
    assert_close(result.detach().double(), by_scipy(x.detach()), rtol=2 * eps, atol=eps)
    (gradient,) = torch.autograd.grad(result.sum(), x)
    assert gradient.dtype == dtype
    expected = gradient_by_softmax(x.detach().double(), torch.ones(5, dtype=torch.float64))
    assert_close(gradient.double(), expected, rtol=2 * eps, atol=eps)


@pytest.mark.parametrize("shape", [(), (5,), (2, 3, 5), (0, 5), (4, 1), (4, 0)])
def test_shapes(suffix_logsumexp, shape):
    x = torch.randn(shape, dtype=torch.float64)
    expected = by_scipy(x) if x.numel() > 1 else x  # one value is its own sum, and SciPy wants at least one
    assert_close(suffix_logsumexp(x), expected)


def test_strided_input(suffix_logsumexp):
    x = torch.randn(5, 4, dtype=torch.float64)
    assert_close(suffix_logsumexp(x.T), by_scipy(x.T.contiguous()))
    assert_close(suffix_logsumexp(x[:, ::2]), by_scipy(x[:, ::2].contiguous()))
    assert_close(suffix_logsumexp(x[:1].expand(3, 4)), by_scipy(x[:1].expand(3, 4)))


def test_plus_infinity_outweighs_all(suffix_logsumexp):
    x = torch.tensor([1.0, inf, 2.0, inf, 0.0, -inf], requires_grad=True)
    result = suffix_logsumexp(x)
    assert result.tolist() == [inf, inf, inf, inf, 0.0, -inf]
    (gradient,) = torch.autograd.grad(result[:5].sum(), x)
    assert_close(gradient, torch.tensor([0, math.nan, 0, math.nan, 1, 0]), equal_nan=True)
    assert suffix_logsumexp(torch.tensor([inf, math.nan, inf, -inf])).isnan().tolist() == [
        True,
        True,
        False,
        False,
    ]


def test_nan_leaves_other_rows_alone(suffix_logsumexp):
    x = torch.randn(3, 40, dtype=torch.float64, requires_grad=True)
    clean = torch.autograd.grad(suffix_logsumexp(x).sum(), x)[0]
    with torch.no_grad():
        x[1, 20] = math.nan
    result = suffix_logsumexp(x)
    assert result[1].isnan().tolist() == [True] * 21 + [False] * 19
    (gradient,) = torch.autograd.grad(result.sum(), x)
    assert gradient[1, 21:].isnan().all()
    assert_close(gradient[[0, 2]], clean[[0, 2]])


def test_unknown_engines_and_dtypes():
    with pytest.raises(ValueError, match="'fast'"):
        public(torch.zeros(3), backend="fast")
    with pytest.raises(TypeError, match="int64"):
        public(torch.zeros(3, dtype=torch.int64))


# Beyond the reference


@needs_native
@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize("length", [1, 2, 3, 7, 8, 9, 31, 100, 301])
@pytest.mark.parametrize(("dtype", "budget"), [(torch.float64, 4e-15), (torch.float32, 5e-7)])
def test_error_of_the_native_engine(spread, length, dtype, budget):
    """Of values by size, of gradients by the row's largest; at any level, also where float32 is coarse."""
    level = torch.tensor([0, 0, 100, -1e3, 9e3, -2e4, 1e6, 1e8], dtype=torch.float64)[:, None]
    x = (spread * torch.randn(8, length, dtype=torch.float64) + level).to(dtype).requires_grad_()
    for weight in (torch.ones(8, length, dtype=dtype), torch.randn(8, length, dtype=dtype)):
        result = native(x)
        (gradient,) = torch.autograd.grad(result, x, weight)
        assert_close(result.detach().double(), by_scipy(x.detach()), rtol=budget, atol=budget)
        expected = gradient_by_softmax(x.detach().double(), weight.double())
        error = (gradient.double() - expected).abs().amax(-1) / expected.abs().amax(-1)
        assert error.max() < 2 * budget


@needs_native
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_long_row_of_equals(dtype):
    """log(n - k), and from all suffixes 1/n + ... + 1/(n - j): sums of many terms, in double."""
    n = 100_000
    x = torch.full((n,), 3.0, dtype=dtype, requires_grad=True)
    result = native(x)
    (gradient,) = torch.autograd.grad(result.sum(), x)
    left = n - torch.arange(n, dtype=torch.float64)
    rtol = 3e-7 if dtype == torch.float32 else 1e-13
    assert_close(result.detach().double(), 3 + left.log(), rtol=rtol, atol=0)
    assert_close(gradient.double(), (1 / left).cumsum(0), rtol=10 * rtol, atol=0)


@needs_native
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_long_fall(dtype):
    """A geometric series at every place, from e^0 down to e^-100000."""
    n = 100_001
    k = torch.arange(n, dtype=torch.float64)
    x = (-k).to(dtype).requires_grad_()
    result = native(x)
    series = torch.log(-torch.expm1(k - n) / -math.expm1(-1))
    assert_close(result.detach().double(), series - k, rtol=3e-7 if dtype == torch.float32 else 1e-15, atol=0)
    (gradient,) = torch.autograd.grad(result.sum(), x)
    # Place j holds (1 - 1/e) e^(k-j) of suffix k, far from the end.
    assert_close(gradient[: n - 50].double(), -torch.expm1(-k - 1)[: n - 50], rtol=1e-6, atol=1e-10)


@needs_native
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_lowest_finite_value_is_finite(dtype):
    lowest = torch.finfo(dtype).min
    x = torch.tensor([1.0, 2.0, lowest, lowest, -inf], dtype=dtype, requires_grad=True)
    result = native(x)
    assert_close(result.detach()[:1], torch.logsumexp(x.detach()[:2], 0, keepdim=True))
    assert result.tolist()[1:] == [2.0, lowest, lowest, -inf]
    (gradient,) = torch.autograd.grad(result[2:4].sum(), x)
    assert_close(gradient, torch.tensor([0, 0, 0.5, 1.5, 0], dtype=dtype))


@needs_native
@pytest.mark.parametrize("size", [1e-30, 1e10, 1e30])
def test_gradients_of_any_size_come_back(size):
    x = torch.tensor([[0.0, 39.0, 5.0, -14.0]], requires_grad=True)
    weight = torch.tensor([[1.0, -2.0, 0.5, 3.0]])
    (gradient,) = torch.autograd.grad(native(x), x, size * weight)
    expected = gradient_by_softmax(x.detach().double(), weight.double()) * size
    assert_close(gradient.double(), expected, rtol=1e-6, atol=1e-12 * size)


@needs_native
def test_a_nan_that_comes_back_reaches_what_its_suffix_holds():
    x = torch.zeros(40, requires_grad=True)
    upstream = torch.zeros(40)
    upstream[20] = math.nan
    (gradient,) = torch.autograd.grad(native(x), x, upstream)
    assert gradient.isnan().tolist() == [False] * 20 + [True] * 20


@needs_native
@pytest.mark.parametrize("threads", [1, 2])
def test_rows_do_not_meet(threads):
    torch.set_num_threads(threads)
    x = (30 * torch.randn(2000, 13)).requires_grad_()
    together = native(x)
    (gradient,) = torch.autograd.grad(together.sum(), x)
    for row in range(0, 2000, 97):
        one = x.detach()[row].clone().requires_grad_()
        alone = native(one)
        assert_close(together[row], alone, rtol=0, atol=0)
        assert_close(gradient[row], torch.autograd.grad(alone.sum(), one)[0], rtol=0, atol=0)


@needs_native
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_operator_is_well_behaved(dtype):
    x = torch.randn(3, 5, dtype=dtype)
    strided = torch.randn(5, 6, dtype=dtype).T[::2]
    for case in (x, strided):
        torch.library.opcheck(torch.ops.luce.suffix_logsumexp_backward, (torch.ones_like(case), case))
        torch.library.opcheck(torch.ops.luce.suffix_logsumexp, (case.requires_grad_(),))


@needs_native
def test_wrong_shapes_do_not_reach_memory():
    x = torch.randn(3, 5)
    for upstream in (
        torch.randn(3, 4),
        torch.randn(2, 5),
        torch.randn(15),
        torch.ones(3, 5, dtype=torch.int64),
    ):
        with pytest.raises(RuntimeError, match="upstream"):
            torch.ops.luce.suffix_logsumexp_backward(upstream, x)


@needs_native
def test_compiled():
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)

    def step(x):
        return (native(x) ** 2).sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert_close(compiled(x), step(x))
    assert_close(torch.autograd.grad(compiled(x), x), torch.autograd.grad(step(x), x))
