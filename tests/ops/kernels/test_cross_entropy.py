"""Cross-entropy in Triton: against float64, and the contract of the operator."""

from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

import luce
from luce.ops import engines
from luce.ops.cross_entropy import cross_entropy

pytestmark = [] if engines.INTERPRETED else [pytest.mark.gpu]

inf, nan = math.inf, math.nan
ROUNDING = {torch.bfloat16: 8e-3 if engines.INTERPRETED else 4e-3, torch.float16: 1e-3}
"""A unit in the last place of a 16-bit gradient. The interpreter truncates bfloat16 instead of rounding."""


@pytest.fixture(params=[0.0, 0.1])
def smoothing(request):
    return request.param


def batch(*shape, dtype=torch.float64, spread=2.0, device="cpu"):
    student = spread * torch.randn(*shape, dtype=torch.float64)
    return student.to(dtype).to(device), torch.randint(shape[1], shape[:1] + shape[2:]).to(device)


def value_and_gradient(student, target, upstream=None, **options):
    student = student.detach().requires_grad_()
    values = cross_entropy(student, target, **options)
    upstream = torch.ones_like(values) if upstream is None else upstream
    return values.detach(), torch.autograd.grad(values, student, upstream)[0]


def agree(student, target, *, rtol=2e-6, **options):
    """With the reference in float64: values, and the gradient over its largest entry in a row."""
    values, gradient = value_and_gradient(student, target, backend="gpu", **options)
    truth, slope = value_and_gradient(student.double(), target, backend="reference", **options)
    assert values.dtype == torch.promote_types(student.dtype, torch.float32)
    assert gradient.dtype == student.dtype
    assert_close(values.double(), truth, rtol=rtol, atol=1e-12, equal_nan=True)
    allowed = (rtol + ROUNDING.get(gradient.dtype, 0)) * slope.abs().amax(1, keepdim=True) + 1e-12
    assert (((gradient.double() - slope).abs() <= allowed) | slope.isnan()).all()
    assert torch.equal(gradient.isnan(), slope.isnan())
    return values, gradient


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("classes", [1, 2, 19])
def test_against_float64(classes, dtype, smoothing, device):
    student, target = batch(4, classes, dtype=dtype, device=device)
    agree(student, target, label_smoothing=smoothing, rtol=1e-12 if dtype == torch.float64 else 2e-6)


@pytest.mark.parametrize("spread", [1.0, 50.0, 1e4])
def test_every_spread(spread, smoothing, device):
    student, target = batch(8, 9, spread=spread, dtype=torch.float32, device=device)
    target[::2] = student[::2].argmax(-1)  # a sure label costs almost nothing, and that has digits too
    agree(student, target, label_smoothing=smoothing)


def test_a_sure_label_keeps_its_digits(device):
    """1 + e^-40 is 1, even in float64."""
    student, target = torch.tensor([[0.0, 40.0]], device=device), torch.tensor([1], device=device)
    value, gradient = value_and_gradient(student, target, backend="gpu")
    assert value.item() == pytest.approx(math.exp(-40), rel=1e-6, abs=0)
    expected = torch.tensor([[math.exp(-40), -math.exp(-40)]], device=device)
    assert_close(gradient, expected, rtol=1e-6, atol=0)


def test_long_rows_take_several_steps(narrow, smoothing, device):
    student, target = batch(4, 53, dtype=torch.float32, device=device)
    student[:, :20] = -inf  # a first step without any class
    target[:] = torch.tensor([20, 30, 52, 40])
    student[1] *= 40
    agree(student, target, label_smoothing=smoothing)


@pytest.mark.parametrize("shape", [(3, 11), (2, 7, 3), (0, 5), (2, 5, 0)], ids=str)
def test_blocks_of_any_strides(shape, smoothing, device):
    student, target = batch(*shape, dtype=torch.float32, device=device)
    for x in (
        student,
        student.transpose(0, 1).contiguous().transpose(0, 1),
        torch.stack([student, torch.full_like(student, nan)], -1)[..., 0],
        student.movedim(1, -1).contiguous().movedim(-1, 1),
    ):
        values, _ = agree(x, target, label_smoothing=smoothing)
        assert values.shape == target.shape


def test_weights(device):
    student, target = batch(4, 9, device=device)
    expected, slope = value_and_gradient(student, target, backend="gpu")
    weight = torch.tensor([2.0, 0.0, 0.5, -1.0], dtype=torch.float64, device=device)
    student[1], target[1] = nan, 99
    values, gradient = value_and_gradient(student, target, weight=weight, backend="gpu")
    assert_close(values, weight * expected)
    assert_close(gradient, weight[:, None] * slope)


def test_special_rows(smoothing, device):
    """A bare row, an excluded label, a class that is not there, NaN, +inf, nothing, wrong labels."""
    student, target = batch(10, 5, dtype=torch.float32, device=device)
    target[:] = 2
    student[1, 2] = student[2, 1] = student[5] = -inf
    student[3, 0], student[4, 4] = nan, inf
    student[6, 2], student[7, 2] = nan, inf
    target[8], target[9] = -1, 5
    gpu, reference = (
        value_and_gradient(student, target, label_smoothing=smoothing, backend=b)
        for b in ("gpu", "reference")
    )
    assert_close(gpu[0], reference[0], equal_nan=True)
    assert gpu[0].isnan().tolist() == [False] * 3 + [True] * 7
    assert gpu[0][1] == inf
    assert_close(gpu[1][:3], reference[1][:3])
    assert gpu[1][3:].isnan().all()


def test_derivatives(smoothing, device):
    student, target = batch(2, 4, device=device)
    student.requires_grad_()
    weight = torch.tensor([1.0, 2.5], dtype=torch.float64, device=device)

    def run(s):
        return cross_entropy(s, target, label_smoothing=smoothing, weight=weight, backend="gpu")

    torch.autograd.gradcheck(run, student, fast_mode=True)
    torch.autograd.gradgradcheck(run, student, fast_mode=True)


def test_bad_input_raises(device):
    student, target = batch(3, 6, device=device)
    for bad in (target[:2], target.int(), target.float()):
        with pytest.raises(RuntimeError, match="expected `target`"):
            cross_entropy(student, bad, backend="gpu")
    with pytest.raises(RuntimeError, match="expected `student`"):
        cross_entropy(target[:, None], target, backend="gpu")


def test_the_loss_takes_the_kernel(device):
    student, target = batch(6, 5, 2, dtype=torch.float32, device=device)
    target[0, 0] = -100
    results = []
    for backend in ("gpu", "reference"):
        x = student.detach().requires_grad_()
        value = luce.cross_entropy_loss(x, target, label_smoothing=0.1, backend=backend)
        (3 * value).backward()
        results.append((value.detach(), x.grad))
    assert_close(results[0], results[1])


def test_more_classes_than_32_bits_can_count_are_refused(device):
    logits, target = torch.zeros((), device=device).expand(1, 2**31), torch.zeros(1, dtype=int, device=device)
    with pytest.raises(
        RuntimeError, match="expected at most 2147479552 classes in `student`, got 2147483648"
    ):
        luce.cross_entropy_loss(logits, target, backend="gpu")
