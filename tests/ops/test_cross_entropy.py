"""Cross-entropy: values by hand, PyTorch's own and float64 as oracles, the engines against each other."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from luce.ops import engines
from luce.ops.cross_entropy import cross_entropy

inf, nan = math.inf, math.nan
native = pytest.mark.skipif(
    engines.WHY_NOT is not None, reason=f"needs the native library: {engines.WHY_NOT}"
)
ENGINES = ["reference", pytest.param("cpu", marks=native)]
SMOOTHINGS = [0.0, 0.1]


def value_and_gradient(student, target, upstream=None, **options):
    student = student.detach().requires_grad_()
    values = cross_entropy(student, target, **options)
    upstream = torch.ones_like(values) if upstream is None else upstream
    return values.detach(), torch.autograd.grad(values, student, upstream)[0]


def batch(*shape, dtype=torch.float64, spread=2.0):
    student = spread * torch.randn(*shape, dtype=torch.float64)
    return student.to(dtype), torch.randint(shape[1], shape[:1] + shape[2:])


@pytest.mark.parametrize("backend", ENGINES)
def test_values_and_gradients_spelled_out(backend):
    student = torch.tensor([[math.log(2) + 5, math.log(3) + 5, math.log(5) + 5, -inf]], dtype=torch.float64)
    target = torch.tensor([1])
    value, gradient = value_and_gradient(student, target, backend=backend)
    assert value.item() == pytest.approx(-math.log(0.3), rel=1e-14)
    assert_close(gradient, torch.tensor([[0.2, 0.3 - 1, 0.5, 0]], dtype=torch.float64))
    value, gradient = value_and_gradient(student, target, label_smoothing=0.6, backend=backend)
    evenly = -(math.log(0.2) + math.log(0.3) + math.log(0.5)) / 3
    assert value.item() == pytest.approx(-0.4 * math.log(0.3) + 0.6 * evenly, rel=1e-14)
    assert_close(gradient, torch.tensor([[0.2 - 0.2, 0.3 - 0.4 - 0.2, 0.5 - 0.2, 0]], dtype=torch.float64))


@pytest.mark.parametrize("backend", ENGINES)
@pytest.mark.parametrize("smoothing", SMOOTHINGS)
def test_as_pytorch(backend, smoothing):
    student, target = batch(6, 9, 4)
    values = cross_entropy(student, target, label_smoothing=smoothing, backend=backend)
    assert_close(values, F.cross_entropy(student, target, reduction="none", label_smoothing=smoothing))


@native
@pytest.mark.parametrize("smoothing", SMOOTHINGS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("classes", [1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 1000, 1001])
def test_engines_agree(classes, dtype, smoothing):
    student, target = batch(5, classes, dtype=dtype)
    upstream = torch.tensor([1.0, 2.0, -1.0, 0.0, 0.5]).to(torch.promote_types(dtype, torch.float32))
    both = [
        value_and_gradient(student, target, upstream, label_smoothing=smoothing, backend=b)
        for b in ("cpu", "reference")
    ]
    rtol = 1e-11 if dtype == torch.float64 else 1e-5
    assert_close(both[0][0], both[1][0], rtol=rtol, atol=rtol)
    assert both[0][1].dtype == dtype
    rtol += {torch.bfloat16: 2e-2, torch.float16: 2e-3}.get(dtype, 0)
    assert_close(both[0][1], both[1][1], rtol=rtol, atol=1e-6)


@native
@pytest.mark.parametrize("shape", [(4, 37), (3, 37, 5), (2, 20, 33), (0, 5), (3, 5, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_of_any_strides(shape, dtype):
    student, target = batch(*shape, dtype=dtype)
    expected, slope = value_and_gradient(student, target, backend="reference")
    for x in (
        student,
        student.transpose(0, 1).contiguous().transpose(0, 1),
        torch.stack([student, torch.full_like(student, nan)], -1)[..., 0],
        student.movedim(1, -1).contiguous().movedim(-1, 1),
    ):
        values, gradient = value_and_gradient(x, target, backend="cpu")
        assert values.shape == target.shape
        assert_close(values, expected)
        assert_close(gradient, slope, rtol=1e-2, atol=1e-5)


@native
def test_weights():
    student, target = batch(4, 9)
    expected, slope = value_and_gradient(student, target, backend="cpu")
    weight = torch.tensor([2.0, 0.0, 0.5, -1.0], dtype=torch.float64)
    student[1], target[1] = nan, 99
    for backend in ("cpu", "reference"):
        values, gradient = value_and_gradient(student, target, weight=weight, backend=backend)
        assert_close(values, weight * expected)
        assert_close(gradient, weight[:, None] * slope)


@native
@pytest.mark.parametrize("smoothing", SMOOTHINGS)
def test_special_rows(smoothing):
    """A bare row, an excluded label, a class that is not there, NaN, +inf, nothing, wrong labels."""
    for classes in (5, 40):
        student, target = batch(10, classes, dtype=torch.float32)
        target[:] = 2
        student[1, 2] = student[2, 1] = student[5] = -inf
        student[3, 0], student[4, 4] = nan, inf
        student[6, 2], student[7, 2] = nan, inf
        target[8], target[9] = -1, classes
        cpu, reference = (
            value_and_gradient(student, target, label_smoothing=smoothing, backend=b)
            for b in ("cpu", "reference")
        )
        assert_close(cpu[0], reference[0], equal_nan=True)
        assert cpu[0].isnan().tolist() == [False] * 3 + [True] * 7
        assert cpu[0][1] == inf
        assert_close(cpu[1][:3], reference[1][:3])
        assert cpu[1][3:].isnan().all()


@native
@pytest.mark.parametrize("smoothing", SMOOTHINGS)
@pytest.mark.parametrize("classes", [2, 9, 100, 1000])
@pytest.mark.parametrize("spread", [1.0, 50.0, 1e3, 1e4])
def test_error_budget(spread, classes, smoothing):
    student = spread * (torch.rand(32, classes) - 0.5)
    target = torch.randint(classes, (32,))
    target[::2] = student[::2].argmax(-1)  # a sure label costs almost nothing, and that has digits too
    values, gradient = value_and_gradient(student, target, label_smoothing=smoothing, backend="cpu")
    truth, slope = value_and_gradient(
        student.double(), target, label_smoothing=smoothing, backend="reference"
    )
    assert ((values - truth).abs() <= 2e-6 * truth + 1e-13).all()
    assert ((gradient - slope).abs().amax(-1) <= 2e-6 * slope.abs().amax(-1) + 1e-13).all()


@native
def test_a_sure_label_keeps_its_digits():
    """1 + e^-40 is 1, even in float64."""
    student = torch.tensor([[0.0, 40.0]])
    value, gradient = value_and_gradient(student, torch.tensor([1]), backend="cpu")
    assert value.item() == pytest.approx(math.exp(-40), rel=1e-6, abs=0)
    assert_close(gradient, torch.tensor([[math.exp(-40), -math.exp(-40)]]), rtol=1e-6, atol=0)


@native
@pytest.mark.parametrize("smoothing", SMOOTHINGS)
def test_pytorch_finds_nothing_wrong(smoothing):
    student, target = batch(3, 6)
    student.requires_grad_()
    weight = torch.tensor([1.0, 0.0, 2.5], dtype=torch.float64)

    def run(s):
        return cross_entropy(s, target, label_smoothing=smoothing, weight=weight, backend="cpu")

    torch.autograd.gradcheck(run, student)
    torch.autograd.gradgradcheck(run, student)
    torch.library.opcheck(torch.ops.luce.cross_entropy.default, (student, target, weight, smoothing, True))
    torch.compiler.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for f in (run, compiled):
        assert_close(
            torch.autograd.grad(f(student).sum(), student), torch.autograd.grad(run(student).sum(), student)
        )
    assert_close(compiled(student), run(student))


@native
def test_bad_input_raises():
    student, target = batch(3, 6)
    for bad in (target[:2], target.int(), target.float()):
        with pytest.raises(RuntimeError, match="expected `target`"):
            cross_entropy(student, bad, backend="cpu")
    with pytest.raises(RuntimeError, match="expected `student`"):
        cross_entropy(target[:, None], target, backend="cpu")
