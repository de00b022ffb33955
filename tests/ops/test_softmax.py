"""Softmax of every algorithm and dtype, against float64 and against its definition."""

from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

from benchmarks.studies import ulp
from luce.ops import engines
from luce.ops.softmax import ALGORITHMS, log_softmax, softmax

inf, nan = math.inf, math.nan
F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
DTYPES = [F32, F64, BF16, F16]

native = pytest.mark.skipif(engines.WHY_NOT is not None, reason=f"no native library: {engines.WHY_NOT}")
BACKENDS = ["reference", pytest.param("cpu", marks=native)]
LENGTHS = [1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 1000, 1001, 4096, 4097]
LONG = [70_000, 3 * 65_536 + 5]  # several slices, the last one short

each_algorithm = pytest.mark.parametrize("algorithm", ALGORITHMS)
each_engine = pytest.mark.parametrize(  # the reference ignores `algorithm`
    ("backend", "algorithm"),
    [("reference", "auto"), *(pytest.param("cpu", algorithm, marks=native) for algorithm in ALGORITHMS)],
)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_backend = pytest.mark.parametrize("backend", BACKENDS)
either = pytest.mark.parametrize(
    ("softmax_of", "exact"),
    [(softmax, torch.softmax), (log_softmax, torch.log_softmax)],
    ids=["softmax", "log"],
)


def random(shape, dtype, spread=3.0):
    """Return logits that float16 holds, as do their log-probabilities."""
    return (spread * torch.randn(shape, dtype=F64)).clamp(-3e4, 3e4).to(dtype)


def assert_softmax(y, x, softmax_of, exact, dim=-1):
    """Compare with float64, allowing for the rounding of x - max and a few units in the last place.

    Relative to each value, down to the smallest normal number; logarithms below 1 to that.
    """
    assert y.dtype == x.dtype
    assert y.shape == x.shape
    expected = exact(x.double(), dim)
    eps = torch.finfo(x.dtype).eps
    if x.dtype in (BF16, F16):
        rtol, atol = 0.51 * eps, 0.51 * eps  # rounded once
    elif softmax_of is log_softmax:
        rtol, atol = 3 * eps, 8 * eps
    else:
        rtol = (50 if x.dtype == F32 else 400) * eps  # |x - max| is up to 88, or 708
    if softmax_of is softmax:
        atol = torch.finfo(x.dtype).tiny
    assert_close(y.double(), expected, rtol=rtol, atol=atol)


# Values


@each_backend
@either
def test_spelled_out(softmax_of, exact, backend):
    total = math.exp(2) + 1 + math.exp(-1)
    expected = torch.tensor([[math.exp(2) / total, 1 / total, math.exp(-1) / total]], dtype=F64)
    y = softmax_of(torch.tensor([[2.0, 0.0, -1.0]], dtype=F64), backend=backend)
    assert_close(y, expected if softmax_of is softmax else expected.log(), rtol=1e-15, atol=1e-15)


@native
@either
@each_dtype
@each_algorithm
@pytest.mark.parametrize("spread", [1.0, 50.0, 1e3, 1e4])
def test_every_length(softmax_of, exact, algorithm, dtype, spread):
    for length in LENGTHS:
        x = random((3, length), dtype, spread)
        assert_softmax(softmax_of(x, algorithm=algorithm), x, softmax_of, exact)


@native
@either
@each_dtype
@each_algorithm
def test_several_slices(softmax_of, exact, algorithm, dtype):
    for length in LONG:
        x = random((1, length), dtype)
        assert_softmax(softmax_of(x, algorithm=algorithm), x, softmax_of, exact)


@each_dtype
@either
def test_reference(softmax_of, exact, dtype):
    for length in (1, 2, 33, 1000):
        x = random((3, length), dtype, 50.0)
        assert_softmax(softmax_of(x, backend="reference"), x, softmax_of, exact)


@native
@pytest.mark.slow
@each_algorithm
def test_results_past_the_caches(algorithm):
    """About 64 MiB: stored past the caches, from an aligned element on."""
    x = random((3, 5_500_001), F32)
    assert_softmax(softmax(x, algorithm=algorithm), x, softmax, torch.softmax)


@native
@each_algorithm
@pytest.mark.parametrize("value", [0.3, -7.7])
@pytest.mark.parametrize("n", [1 << 20, pytest.param(1 << 24, marks=pytest.mark.slow)])
def test_long_sums_keep_their_digits(algorithm, value, n):
    """A plain float32 sum of 2^24 equal terms is off by more than 1e-3, of 2^20 by more than 1e-4."""
    y = softmax(torch.full((1, n), value), algorithm=algorithm)
    assert_close(y, torch.full((1, n), 1 / n), rtol=5e-7, atol=0)


@native
@each_algorithm
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_rows_far_from_zero(algorithm, dtype):
    """Beyond 1e5 a power of two no longer holds an exponential and its mantissa."""
    x = random((4, 300), dtype, 2.0)
    for offset in (-1e30, -3e6, -2e5, -9.1e4, -8.9e4, -1.2e4, 1.2e4, 8.9e4, 9.1e4, 2e5, 3e6, 1e30):
        moved = x + offset
        assert_softmax(softmax(moved, algorithm=algorithm), moved, softmax, torch.softmax)
        assert_softmax(log_softmax(moved, algorithm=algorithm), moved, log_softmax, torch.log_softmax)


@native
@each_algorithm
@pytest.mark.parametrize("direction", [1, -1])
def test_a_sum_whose_scale_moves_all_the_time(algorithm, direction):
    x = direction * torch.linspace(-3e4, 3e4, 20_000)[None]
    assert_softmax(softmax(x, algorithm=algorithm), x, softmax, torch.softmax)
    columns = x.T.reshape(1, -1, 1).repeat(1, 1, 40)
    assert_softmax(softmax(columns, 1, algorithm=algorithm), columns, softmax, torch.softmax, 1)


@native
@pytest.mark.parametrize("algorithm", ["auto", "three_pass_recompute", "three_pass_reload", "online"])
def test_logarithms_near_zero_keep_their_digits(algorithm):
    """log(1 / (1 + 31 e^-30)) is not 0, as it is where a float32 sum swallows the small ones."""
    x = torch.full((1, 32), -30.0)
    x[0, 5] = 0
    expected = -math.log1p(31 * math.exp(-30))
    assert log_softmax(x, algorithm=algorithm)[0, 5].item() == pytest.approx(expected, rel=1e-3)
    assert log_softmax(x[:, 5:6], algorithm=algorithm).item() == 0


# Special values


@each_engine
@each_dtype
@pytest.mark.parametrize("length", [5, 40, 131, 5000])
def test_excluded_classes(algorithm, dtype, backend, length):
    x = random((4, length), dtype)
    out = torch.rand(4, length) < 0.5
    out[:, 0] = False
    x[out] = -inf
    y, log_y = (
        softmax(x, algorithm=algorithm, backend=backend),
        log_softmax(x, algorithm=algorithm, backend=backend),
    )
    assert (y[out] == 0).all()
    assert (log_y[out] == -inf).all()
    for row in range(4):
        kept = x[row : row + 1][~out[row : row + 1]][None]
        assert_softmax(y[row : row + 1][~out[row : row + 1]][None], kept, softmax, torch.softmax)
        assert_softmax(log_y[row : row + 1][~out[row : row + 1]][None], kept, log_softmax, torch.log_softmax)


@each_engine
@each_dtype
@either
@pytest.mark.parametrize("length", [3, 40, 131, 5000, 70_000])
def test_rows_without_a_softmax(softmax_of, exact, algorithm, dtype, backend, length):
    for place in (0, length // 2, length - 1):
        x = random((6, length), dtype)
        x[1, place] = nan
        x[2] = -inf
        x[3, place] = inf
        y = softmax_of(x, algorithm=algorithm, backend=backend)
        assert y.isnan().all(-1).tolist() == [False, True, True, True, False, False]
        fine = [0, 4, 5]
        assert_softmax(y[fine], x[fine], softmax_of, exact)


@native
@each_algorithm
@either
def test_pixels_without_a_softmax(softmax_of, exact, algorithm):
    x = random((2, 7, 50), F32)
    x[0, 3, 11], x[0, :, 20], x[1, 2, 49], x[0, :, 30] = nan, -inf, inf, 1e30
    x[0, 1, 35] = -inf
    y = softmax_of(x, 1, algorithm=algorithm)
    expected = exact(x.double(), 1)
    assert (y.isnan() == expected.isnan()).all()
    assert y.isnan().any(1).sum() == 3
    assert_close(y.double(), expected, rtol=2e-6, atol=3e-7, equal_nan=True)


# Shapes and layouts


@native
@each_dtype
@either
@each_algorithm
@pytest.mark.parametrize("size", [(2, 5, 4, 9), (1, 21, 7, 13), (2, 3, 1, 2), (3, 1, 8, 8), (1, 130, 16, 16)])
def test_images(softmax_of, exact, algorithm, dtype, size):
    x = random(size, dtype)
    y = softmax_of(x, 1, algorithm=algorithm)
    assert y.stride() == x.stride()
    assert_softmax(y, x, softmax_of, exact, 1)
    last = x.to(memory_format=torch.channels_last)
    y = softmax_of(last, 1, algorithm=algorithm)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert_softmax(y, x, softmax_of, exact, 1)


@native
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_images_are_not_copied(memory_format):
    x = torch.empty(2, 8, 64, 64).to(memory_format=memory_format)
    seen = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(function.name())
            return function(*args, **(kwargs or {}))

    with Watch():
        softmax(x, 1)
    assert "luce::softmax_forward" in seen
    assert not {"aten::clone", "aten::copy_", "aten::_to_copy", "aten::permute"} & set(seen)


@each_backend
@each_dtype
@either
def test_layouts(softmax_of, exact, dtype, backend):
    x = random((6, 40, 50), dtype)
    for view, dim in [
        (x[0], 0), (x[0], 1), (x[0].T, 1), (x[0].T, 0), (x[0, :, ::3], 1), (x[0, ::3], 1),
        (x[0, :, 3:20], -1), (x[0, :, 3:50:2], 0),
        (x, 0), (x, 1), (x, 2), (x.transpose(0, 2), 1), (x[:, ::2, ::2], 1), (x[:, :, 1:34], 1),
        (x[0, 0], 0), (x[0, 0, ::7], -1), (x[0, :1].expand(5, -1), 1), (x[0, :, :1].expand(-1, 5), 1),
        (x[0, :, :1].expand(-1, 5), 0), (x.view(2, 3, 40, 5, 10), 2),
        (x.view(2, 3, 40, 5, 10).movedim(2, 4), 4),
    ]:  # fmt: skip
        assert_softmax(softmax_of(view, dim, backend=backend), view, softmax_of, exact, dim)


@each_backend
@pytest.mark.parametrize(
    ("shape", "dim"), [((0, 5), 1), ((5, 0), 1), ((0, 3, 4), 1), ((2, 0, 4), 1), ((2, 3, 0), 1)]
)
def test_nothing(shape, dim, backend):
    x = torch.empty(shape, requires_grad=True)
    y = softmax(x, dim, backend=backend)
    assert y.shape == shape
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert gradient.shape == shape


@native
@each_algorithm
@pytest.mark.parametrize(("shape", "dtype"), [((1, 300_001), F32), ((7, 1001), F32), ((1, 200_000), BF16)])
def test_the_number_of_threads_changes_nothing(algorithm, shape, dtype):
    x = random(shape, dtype)
    alone = softmax(x, algorithm=algorithm), log_softmax(x, algorithm=algorithm)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        together = softmax(x, algorithm=algorithm), log_softmax(x, algorithm=algorithm)
        assert torch.equal(alone[0], together[0])
        assert torch.equal(alone[1], together[1])


# Derivatives


@each_backend
@each_dtype
@pytest.mark.parametrize("shape", [(4, 33), (2, 5, 40)])
@either
def test_gradient(softmax_of, exact, dtype, shape, backend):
    x = random(shape, dtype).requires_grad_()
    g = torch.randn(shape).to(dtype)
    (gradient,) = torch.autograd.grad(softmax_of(x, 1, backend=backend), x, g)
    double = x.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(exact(double, 1), double, g.double())
    assert gradient.dtype == dtype
    eps = torch.finfo(dtype).eps
    assert_close(gradient.double(), expected, rtol=8 * eps, atol=8 * eps * g.abs().sum(1).max().item())


@each_backend
@pytest.mark.parametrize("softmax_of", [softmax, log_softmax])
def test_gradcheck(softmax_of, backend):
    x = random((2, 5, 3), F64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: softmax_of(x, 1, backend=backend), x)
    assert torch.autograd.gradgradcheck(lambda x: softmax_of(x, 1, backend=backend), x)


def test_no_gradient_for_excluded_classes():
    x = torch.tensor([[0.5, -inf, 1.0]], requires_grad=True)
    for y in (softmax(x), log_softmax(x).exp()):
        (gradient,) = torch.autograd.grad(y[0, 0], x)
        share = 1 / (1 + math.exp(0.5))
        expected = share * (1 - share)
        assert_close(gradient, torch.tensor([[expected, 0.0, -expected]]))


@native
@pytest.mark.parametrize("logarithm", [False, True])
@pytest.mark.parametrize("shape", [(4, 9), (2, 3, 40)])
def test_the_operator_keeps_the_rules(shape, logarithm):
    for x in (random(shape, F32).requires_grad_(), random(shape, BF16)):
        torch.library.opcheck(torch.ops.luce.softmax.default, (x, 0, logarithm))
    torch.library.opcheck(torch.ops.luce.softmax_forward.default, (random(shape, F32), 0, logarithm))


@native
def test_compiled():
    compiled = torch.compile(
        lambda x: softmax(x, 1) * log_softmax(x, 1), fullgraph=True, backend="aot_eager", dynamic=False
    )
    x = random((3, 7, 11), F32).requires_grad_()
    expected = torch.softmax(x, 1) * torch.log_softmax(x, 1)
    assert_close(compiled(x), expected)
    assert_close(*(torch.autograd.grad(y.sum(), x)[0] for y in (compiled(x), expected)))


# Exponentials


@native
def test_units_in_the_last_place():
    """Every 256th number; `benchmarks.studies.ulp` can do all."""
    bound = 2.3 if torch.ops.luce.instruction_set() == "x86-64-v2" else 2.0
    assert 1.5 < ulp.worst(ulp.mantissa_error, 2**-13, 708.0, 256)[0] < bound
    assert 1.5 < ulp.worst(ulp.value_error, 2**-13, 80.0, 256)[0] < bound


@native
def test_mantissa_and_exponent():
    x = torch.linspace(-1e4, 1e4, 100_001)
    mantissa, exponent, _ = torch.ops.luce.exp_parts(x)
    assert (exponent == exponent.round()).all()
    assert mantissa.min() > 0.7
    assert mantissa.max() < 1.42
    logarithm = exponent.double() * math.log(2) + mantissa.double().log()
    assert_close(logarithm, x.double(), rtol=0, atol=3e-7)


# Errors


def test_errors():
    x = torch.zeros(2, 3)
    with pytest.raises(TypeError, match=r"got torch\.int64"):
        softmax(x.long())
    with pytest.raises(ValueError, match="one of the 2 dimensions of `x`, got 2"):
        softmax(x, 2)
    with pytest.raises(ValueError, match="one of the 0 dimensions of `x`, got -1"):
        softmax(x[0, 0])
    with pytest.raises(ValueError, match="'online', got 'fast'"):
        softmax(x, algorithm="fast")
    with pytest.raises(ValueError, match="backend"):
        log_softmax(x, backend="fast")


@native
def test_bad_operands_of_the_operator():
    for x, algorithm in [
        (torch.zeros(3), 0),
        (torch.zeros(2, 3).long(), 0),
        (torch.zeros(2, 3), 6),
        (torch.zeros(2, 3), -1),
    ]:
        with pytest.raises(RuntimeError, match="expected"):
            torch.ops.luce.softmax(x, algorithm, False)
