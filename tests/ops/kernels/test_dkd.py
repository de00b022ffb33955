"""DKD in Triton: against float64, and the contract of the operator."""

from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

import luce
from luce.ops import engines
from luce.ops.dkd import weighted_dkd

pytestmark = [] if engines.INTERPRETED else [pytest.mark.gpu]

inf, nan = math.inf, math.nan
ROUNDING = {torch.bfloat16: 8e-3 if engines.INTERPRETED else 4e-3, torch.float16: 1e-3}
"""A unit in the last place of a 16-bit gradient. The interpreter truncates bfloat16 instead of rounding."""
PARTS = {"both": (1.0, 8.0), "the target alone": (1.0, 0.0), "the rest alone": (0.0, 2.0)}


@pytest.fixture(params=PARTS.values(), ids=PARTS)
def parts(request):
    return request.param


def batch(*shape, dtype=torch.float64, spread=2.0, device="cpu"):
    student, teacher = (spread * torch.randn(2, *shape, dtype=torch.float64)).to(dtype).to(device)
    return student, teacher, torch.randint(shape[1], shape[:1] + shape[2:]).to(device)


def value_and_gradient(student, teacher, target, temperature=1.0, parts=(1.0, 8.0), upstream=None, **options):
    student = student.detach().requires_grad_()
    alpha, beta = parts
    values = weighted_dkd(student, teacher, target, temperature, alpha=alpha, beta=beta, **options)
    upstream = torch.ones_like(values) if upstream is None else upstream
    return values.detach(), torch.autograd.grad(values, student, upstream)[0]


def agree(student, teacher, target, temperature=1.0, parts=(1.0, 8.0), *, rtol=3e-6):
    """With the reference in float64: values, and the gradient over its largest entry in a row.

    The first part compares two numbers that may agree by chance, known to an epsilon of a nat.
    """
    values, gradient = value_and_gradient(student, teacher, target, temperature, parts, backend="gpu")
    truth, slope = value_and_gradient(
        student.double(), teacher.double(), target, temperature, parts, backend="reference"
    )
    assert values.dtype == torch.promote_types(
        torch.promote_types(student.dtype, teacher.dtype), torch.float32
    )
    assert gradient.dtype == student.dtype
    chance = 2e-7 if values.dtype == torch.float32 and parts[0] else 0
    allowed = rtol * truth + chance * truth.sqrt() + 1e-12
    assert ((values - truth).abs() <= allowed).all(), (values, truth)
    allowed = (rtol + ROUNDING.get(gradient.dtype, 0)) * slope.abs().amax(1, keepdim=True)
    assert ((gradient - slope).abs() <= allowed + chance / temperature + 1e-12).all()
    return values, gradient


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("classes", [2, 19])
def test_against_float64(classes, dtype, parts, device):
    agree(
        *batch(3, classes, dtype=dtype, device=device),
        2.5,
        parts,
        rtol=1e-11 if dtype == torch.float64 else 3e-6,
    )


@pytest.mark.parametrize(
    ("spread", "temperature"), [(1.0, 1.0), (1.0, 1e6), (50.0, 1.0), (50.0, 30.0), (1e4, 30.0), (1e4, 1e6)]
)
def test_every_temperature_and_spread(temperature, spread, parts, device):
    agree(*batch(4, 9, spread=spread, dtype=torch.float32, device=device), temperature, parts)


def test_close_networks(parts, device):
    student, _, target = batch(4, 9, dtype=torch.float32, device=device)
    agree(student, student + 1e-3 * torch.randn_like(student), target, 1.0, parts, rtol=1e-5)


def test_long_rows_take_several_steps(narrow, parts, device):
    student, teacher, target = batch(3, 39, dtype=torch.float32, device=device)
    teacher[0, :20] = student[0, :20] = -inf  # a first step without any class
    target[:] = torch.tensor([22, 3, 38])
    agree(student, teacher, target, 1.0, parts)
    agree(student, teacher, target, 1e5, parts)


@pytest.mark.parametrize("shape", [(3, 11), (2, 7, 3), (0, 5), (2, 5, 0)], ids=str)
def test_blocks_of_any_strides(shape, device):
    student, teacher, target = batch(*shape, dtype=torch.float32, device=device)
    for change in (
        lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
        lambda x: torch.stack([x, torch.full_like(x, nan)], -1)[..., 0],
        lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1),
    ):
        values, _ = agree(change(student), change(teacher), target)
        assert values.shape == target.shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_rows_without_a_rest(dtype, device):
    """A class that is all there is; a teacher, and a student, that know of no other."""
    bare = torch.tensor([[-inf, 0.5, -inf]], dtype=dtype, device=device)
    full = torch.tensor([[0.0, 0.5, -inf]], dtype=dtype, device=device)
    label = torch.tensor([1], device=device)

    def run(s, t, *parts):
        return value_and_gradient(s, t, label, 1.0, parts, backend="gpu")

    value, gradient = run(bare, bare, 1.0, 8.0)
    assert value == 0
    assert (gradient == 0).all()
    value, gradient = run(full, bare, 1.0, 8.0)
    assert value.item() == pytest.approx(math.log(1 + math.exp(-0.5)), rel=1e-6)
    q = 1 / (1 + math.exp(0.5))
    assert_close(gradient, torch.tensor([[q, -q, 0.0]], dtype=dtype, device=device))
    assert run(bare, full, 1.0, 0.0)[0] == inf
    assert run(bare, full, 0.0, 1.0)[0] == inf


@pytest.mark.parametrize("who", [0, 1], ids=["student", "teacher"])
def test_a_class_that_one_network_excludes(who, parts, device):
    *pair, target = batch(3, 9, dtype=torch.float32, device=device)
    pair[who][1, 0], target[1] = -inf, 3
    gpu, reference = (value_and_gradient(*pair, target, 1.0, parts, backend=b) for b in ("gpu", "reference"))
    assert_close(gpu, reference, rtol=1e-5, atol=1e-5)
    target[1] = 0
    values, gradient = value_and_gradient(*pair, target, 1.0, parts, backend="gpu")
    assert (values[1] == inf) == (who == 0 and parts[0] > 0)
    assert gradient.isfinite().all()


def test_labels_that_name_no_class_spoil_their_row(device):
    student, teacher, _ = batch(6, 4, device=device)
    student[4, 2] = teacher[4, 2] = -inf
    target = torch.tensor([0, -1, 4, -100, 2, 3], device=device)
    values, gradient = value_and_gradient(student, teacher, target, backend="gpu")
    assert values.isnan().tolist() == [False, True, True, True, True, False]
    assert gradient.isnan().all(1).tolist() == [False, True, True, True, True, False]
    weight = torch.tensor([1.0, 0.0, 0.0, 0.0, 0.0, 1.0], dtype=torch.float64, device=device)
    values, gradient = value_and_gradient(student, teacher, target, weight=weight, backend="gpu")
    assert gradient.isfinite().all()
    assert (values[1:5] == 0).all()


@pytest.mark.parametrize("junk", [nan, inf])
def test_nan_and_infinity_spoil_their_row_and_no_other(junk, device):
    student, teacher, target = batch(3, 5, dtype=torch.float32, device=device)
    expected, slope = value_and_gradient(student, teacher, target, backend="gpu")
    for network, place in ((0, 0), (0, int(target[1])), (1, 2), (1, int(target[1]))):
        pair = [student.clone(), teacher.clone()]
        pair[network][1, place] = junk
        values, gradient = value_and_gradient(*pair, target, backend="gpu")
        assert values.isnan().tolist() == [False, True, False]
        assert gradient[1].isnan().all()
        assert_close(values[[0, 2]], expected[[0, 2]], rtol=0, atol=0)
        assert_close(gradient[[0, 2]], slope[[0, 2]], rtol=0, atol=0)


def test_a_network_that_excludes_everything_is_nan(parts, device):
    student, teacher, target = batch(2, 5, dtype=torch.float32, device=device)
    nothing = torch.full_like(student, -inf)
    for pair in ((nothing, teacher), (student, nothing), (nothing, nothing)):
        assert value_and_gradient(*pair, target, 1.0, parts, backend="gpu")[0].isnan().all()


def test_derivatives(parts, device):
    student, teacher, target = batch(2, 3, device=device)
    student.requires_grad_()

    def run(s):
        return weighted_dkd(s, teacher, target, 3.0, alpha=parts[0], beta=parts[1], backend="gpu")

    torch.autograd.gradcheck(run, student, fast_mode=True)
    torch.autograd.gradgradcheck(run, student, fast_mode=True)


def test_the_loss_takes_the_kernel(device):
    student, teacher, target = batch(6, 5, 2, dtype=torch.float32, device=device)
    target[0, 0] = -100
    found = []
    for backend in ("gpu", "reference"):
        x = student.detach().requires_grad_()
        value = luce.dkd_loss(x, teacher, target, temperature=4.0, backend=backend)
        (3 * value).backward()
        found.append((value.detach(), x.grad))
    assert_close(found[0], found[1])
