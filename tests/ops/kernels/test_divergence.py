"""The divergences in Triton: against float64, and the contract of the operators."""

from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

import luce
from luce.ops import engines
from luce.ops.kd import forward_kl, jsd, kl_limit, reverse_kl

pytestmark = [] if engines.INTERPRETED else [pytest.mark.gpu]

inf, nan = math.inf, math.nan
OPS = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jsd": lambda s, t, temperature, **more: jsd(s, t, 0.3, temperature, **more),
    "limit": lambda s, t, temperature, **more: kl_limit(s, t, **more),
}
ROUNDING = {torch.bfloat16: 8e-3 if engines.INTERPRETED else 4e-3, torch.float16: 1e-3}
"""A unit in the last place of a 16-bit gradient. The interpreter truncates bfloat16 instead of rounding."""


@pytest.fixture(params=OPS.values(), ids=OPS)
def op(request):
    return request.param


def logits(*size, spread=2.0, dtype=torch.float64, device="cpu"):
    return (spread * torch.randn(2, *size, dtype=torch.float64)).to(dtype).to(device)


def value_and_gradient(op, student, teacher, temperature=1.0, upstream=None, **more):
    student = student.detach().requires_grad_()
    values = op(student, teacher, temperature, **more)
    upstream = torch.ones_like(values) if upstream is None else upstream
    return values.detach(), torch.autograd.grad(values, student, upstream)[0]


def agree(op, student, teacher, temperature=1.0, *, rtol=3e-6, weight=None, upstream=None):
    """With the reference in float64: values, and the gradient over its largest entry in a row."""
    values, gradient = value_and_gradient(
        op, student, teacher, temperature, upstream, weight=weight, backend="gpu"
    )
    wide = [None if x is None else x.double() for x in (upstream, weight)]
    truth, slope = value_and_gradient(
        op, student.double(), teacher.double(), temperature, wide[0], weight=wide[1], backend="reference"
    )
    assert values.dtype == torch.promote_types(
        torch.promote_types(student.dtype, teacher.dtype), torch.float32
    )
    assert gradient.dtype == student.dtype
    assert_close(values.double(), truth, rtol=rtol, atol=1e-12, equal_nan=True)
    allowed = (rtol + ROUNDING.get(gradient.dtype, 0)) * slope.abs().amax(1, keepdim=True) + 1e-12
    if op in (reverse_kl, OPS["jsd"]):  # differences from a mean that is as large as the value
        allowed = allowed + 2e-7 * (truth if upstream is None else truth * upstream.abs()).unsqueeze(1)
    error = (gradient.double() - slope).abs()
    assert ((error <= allowed) | slope.isnan()).all(), (error / allowed).max()
    assert torch.equal(gradient.isnan(), slope.isnan())
    return values, gradient


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("classes", [1, 19])
def test_against_float64(op, classes, dtype, device):
    student, teacher = logits(3, classes, dtype=dtype, device=device)
    agree(op, student, teacher, 2.5, rtol=1e-12 if dtype == torch.float64 else 3e-6)


@pytest.mark.parametrize(
    ("spread", "temperature"), [(1.0, 1.0), (1.0, 1e6), (50.0, 1.0), (50.0, 30.0), (1e4, 30.0), (1e4, 1e6)]
)
def test_every_temperature_and_spread(op, temperature, spread, device):
    student, teacher = logits(4, 9, spread=spread, dtype=torch.float32, device=device)
    agree(op, student, teacher, temperature)


@pytest.mark.parametrize("noise", [1e-1, 1e-3, 1e-6])
def test_close_networks(op, noise, device):
    """The difference of two separate softmaxes would keep no digits of their divergence."""
    student = 5 * torch.randn(2, 20)
    teacher = (student + noise * torch.randn_like(student)).to(device)
    student = student.to(device)
    for temperature in (1.0, 100.0):
        agree(op, student, teacher, temperature, rtol=1e-5)


def test_long_rows_take_several_steps(op, narrow, device):
    student, teacher = logits(2, 39, dtype=torch.float32, device=device)
    student[1] *= 40
    teacher[0, :20] = -inf  # a first step without any class
    student[0, :20] = -inf
    agree(op, student, teacher, 1e5)


@pytest.mark.parametrize("dtypes", [("float32", "bfloat16"), ("float16", "float64")], ids="-".join)
def test_mixed_dtypes(op, dtypes, device):
    student, teacher = (
        x.to(getattr(torch, d)) for x, d in zip(logits(2, 9, device=device), dtypes, strict=True)
    )
    agree(op, student, teacher)


def layouts(x):
    """The same numbers, laid out in other ways."""
    yield x.transpose(0, 1).contiguous().transpose(0, 1)
    yield torch.stack([x, torch.full_like(x, nan)], -1)[..., 0]
    yield x.movedim(1, -1).contiguous().movedim(-1, 1)
    yield x[:1].expand(x.shape)


@pytest.mark.parametrize("shape", [(3, 11), (2, 7, 3), (0, 5), (2, 5, 0)], ids=str)
def test_blocks_of_any_strides(op, shape, device):
    dtype = torch.float32 if len(shape) == 2 else torch.bfloat16
    student, teacher = logits(*shape, dtype=dtype, device=device)
    for s, t in zip(layouts(student), layouts(teacher), strict=True):
        values, _ = agree(op, s, t)
        assert values.shape == shape[:1] + shape[2:]


def test_rows_of_weight_zero_are_not_looked_at(op, device):
    student, teacher = logits(5, 9, dtype=torch.float32, device=device)
    values, gradient = value_and_gradient(op, student, teacher, backend="gpu")
    weight = torch.tensor([2.0, 0.0, 0.5, -1.0, nan], device=device)
    student[1] = nan
    weighted, slope = value_and_gradient(op, student, teacher, weight=weight, backend="gpu")
    kept = [0, 2, 3]
    assert_close(weighted[kept], (weight * values)[kept])
    assert_close(slope[kept], (weight[:, None] * gradient)[kept], rtol=1e-5, atol=1e-7)
    assert weighted[1] == 0
    assert (slope[1] == 0).all()
    assert slope[4].isnan().all()


def test_what_comes_from_above_is_multiplied(op, device):
    student, teacher = logits(4, 9, dtype=torch.float32, device=device)
    agree(op, student, teacher, upstream=torch.tensor([1.0, -2.0, 0.0, 3.0], device=device))


def test_classes_that_do_not_exist_change_nothing(op, device):
    student, teacher = logits(3, 6, dtype=torch.float32, device=device)
    values, gradient = value_and_gradient(op, student, teacher, backend="gpu")
    places = torch.arange(6, device=device) * 2 + 1
    wide = [x.new_full((3, 17), -inf).index_copy(1, places, x) for x in (student, teacher)]
    wide_values, wide_gradient = value_and_gradient(op, *wide, backend="gpu")
    assert_close(wide_values, values)
    assert_close(wide_gradient[:, places], gradient)
    wide_gradient[:, places] = 0
    assert (wide_gradient == 0).all()


@pytest.mark.parametrize("who", ["student", "teacher"])
def test_a_class_that_one_network_excludes(op, who, device):
    student, teacher = logits(3, 9, dtype=torch.float32, device=device)
    (student if who == "student" else teacher)[1, 3] = -inf
    values, gradient = value_and_gradient(op, student, teacher, backend="gpu")
    expected, slope = value_and_gradient(op, student, teacher, backend="reference")
    assert_close(values, expected)
    kept = [0, 2] if values[1] == inf and op is reverse_kl else [0, 1, 2]
    assert_close(gradient[kept], slope[kept], rtol=1e-5, atol=1e-6)
    if op is reverse_kl and who == "teacher":
        assert gradient[1].isnan().all()  # there is none where q log(q / 0) is infinite


def test_a_class_that_the_teacher_excludes_and_the_student_all_but_excludes(op, device):
    """At a low temperature the difference of their logits is infinite, and the probability of both is 0."""
    for dtype in (torch.float32, torch.bfloat16):
        student = torch.tensor([[1.0, 2.0, -1e4]], dtype=dtype, device=device)
        teacher = torch.tensor([[0.0, 1.5, -inf]], dtype=dtype, device=device)
        if op is not OPS["limit"]:
            agree(op, student, teacher, 0.5)


def test_two_sure_networks_in_float64(device):
    """Their divergence is far below the smallest number of float32."""
    student, teacher = torch.tensor([[[0.0, 60.0]], [[0.0, 60.1]]], dtype=torch.float64, device=device)
    value, gradient = value_and_gradient(OPS["jsd"], student, teacher, 0.5, backend="gpu")
    truth, slope = value_and_gradient(OPS["jsd"], student, teacher, 0.5, backend="reference")
    assert_close((value, gradient), (truth, slope), rtol=1e-9, atol=0)


@pytest.mark.parametrize("junk", [nan, inf])
def test_nan_and_infinity_spoil_their_row_and_no_other(op, junk, device):
    student, teacher = logits(3, 5, dtype=torch.float32, device=device)
    expected, slope = value_and_gradient(op, student, teacher, backend="gpu")
    for network, place in ((0, 0), (0, 4), (1, 2)):
        pair = [student.clone(), teacher.clone()]
        pair[network][1, place] = junk
        values, gradient = value_and_gradient(op, *pair, backend="gpu")
        assert values.isnan().tolist() == [False, True, False]
        assert gradient[1].isnan().all()
        assert_close(values[[0, 2]], expected[[0, 2]], rtol=0, atol=0)
        assert_close(gradient[[0, 2]], slope[[0, 2]], rtol=0, atol=0)


def test_a_network_that_excludes_everything_is_nan(op, device):
    student, teacher = logits(2, 5, dtype=torch.float32, device=device)
    nothing = torch.full_like(student, -inf)
    for pair in ((nothing, teacher), (student, nothing), (nothing, nothing)):
        assert value_and_gradient(op, *pair, backend="gpu")[0].isnan().all()


def test_logits_beyond_the_range_of_their_difference(op, device):
    student, teacher = logits(2, 8, dtype=torch.float32, device=device)
    student[0, :3], teacher[0, :3] = torch.tensor([3e38, -3e38, 1.0]), torch.tensor([-3e38, 3e38, 1.0])
    student[1, 4], teacher[1, 4] = torch.finfo(torch.float32).min, torch.finfo(torch.float32).min
    values, gradient = value_and_gradient(op, student, teacher, 4.0, backend="gpu")
    truth, slope = value_and_gradient(op, student.double(), teacher.double(), 4.0, backend="reference")
    assert_close(values, truth.float(), rtol=1e-5, atol=0)
    assert gradient.isfinite().all()
    kept = slice(1, 2) if op is OPS["limit"] else slice(0, 2)  # a mean of such numbers is beyond float64 too
    assert_close(gradient[kept], slope[kept].float(), rtol=1e-4, atol=1e-6)


def test_derivatives(op, device):
    student, teacher = logits(2, 3, device=device)
    student.requires_grad_()
    weight = torch.tensor([1.0, 2.5], dtype=torch.float64, device=device)

    def run(s):
        return op(s, teacher, 3.0, weight=weight, backend="gpu")

    torch.autograd.gradcheck(run, student, fast_mode=True)
    torch.autograd.gradgradcheck(run, student, fast_mode=True)


def test_rows_share_a_program_only_as_they_do_alone(op, device):
    student, teacher = logits(9, 5, dtype=torch.float32, device=device)
    student[3] = teacher[3] + 1e-4  # its normalisers are put right, the others' are not
    together = value_and_gradient(op, student, teacher, backend="gpu")
    for row in (0, 3, 8):
        alone = value_and_gradient(op, student[row, None], teacher[row, None], backend="gpu")
        for one, other in zip(alone, together, strict=True):
            assert_close(one, other[row, None], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        (torch.zeros(2, 3), torch.zeros(2, 4)),
        (torch.zeros(2, 3, 2), torch.zeros(2, 3)),
        (torch.zeros(3), torch.zeros(3)),
        (torch.zeros(2, 0), torch.zeros(2, 0)),
        (torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 3)),
    ],
    ids=["classes", "dimensions", "a vector", "no class", "integers"],
)
def test_bad_input_raises(student, teacher, device):
    with pytest.raises(RuntimeError, match="expected"):
        forward_kl(student.to(device), teacher.to(device), 1.0, backend="gpu")
    weight = torch.ones(2, device=device)  # float32 beside float64
    with pytest.raises(RuntimeError, match="expected `weight`"):
        forward_kl(*logits(2, 3, device=device), 1.0, weight=weight, backend="gpu")


def test_the_losses_take_the_kernels(device):
    student, teacher = logits(6, 5, 2, dtype=torch.float32, device=device)
    target = torch.randint(5, (6, 2), device=device)
    target[0, 0] = -100
    for loss in (luce.kd_loss, luce.reverse_kl_loss, luce.jsd_loss):
        for temperature in (2.0, inf):
            found = []
            for backend in ("gpu", "reference"):
                x = student.detach().requires_grad_()
                value = loss(x, teacher, target, temperature=temperature, backend=backend)
                (3 * value).backward()
                found.append((value.detach(), x.grad))
            assert_close(found[0], found[1])


@pytest.mark.parametrize("shape", [(5, 19), (3, 7, 6)], ids=str)
def test_a_gradient_is_multiplied_in_its_place(shape, narrow, device):
    from luce.ops.triton.multiply import multiply_rows

    for layout in (lambda x: x, lambda x: x.transpose(0, 1).contiguous().transpose(0, 1)):
        for dtype in (torch.float32, torch.float64, torch.float16):
            gradient = layout(torch.randn(shape, device=device).to(dtype))
            factors = torch.randn(shape[:1] + shape[2:], device=device, dtype=torch.float64)
            factors = factors.to(torch.promote_types(dtype, torch.float32))
            for factor in (
                factors,
                factors.new_ones(()).expand(factors.shape),
                factors[:1].expand(factors.shape),
            ):
                expected = (gradient * factor.unsqueeze(1)).to(dtype)
                place = gradient.clone()
                assert multiply_rows(place, factor) is place
                assert_close(place, expected)


def test_compiled_is_eager(device):
    torch.compiler.reset()
    student, teacher = logits(3, 5, dtype=torch.float32, device=device)
    expected = value_and_gradient(forward_kl, student, teacher, 2.0, backend="gpu")
    compiled = torch.compile(forward_kl, fullgraph=True, backend="aot_eager")
    assert_close(value_and_gradient(compiled, student, teacher, 2.0, backend="gpu"), expected)
    assert_close(value_and_gradient(compiled, student, teacher, 2.0, backend="auto"), expected)
