"""PLD's first places of long rows, found without a sort: against float64, on rows that make it hard."""

from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

from luce.ops import engines
from luce.ops.pld import PldOptions, pld_with_bound

pytestmark = [] if engines.INTERPRETED else [pytest.mark.gpu]

inf, nan = math.inf, math.nan
ROUNDING = {torch.bfloat16: 8e-3 if engines.INTERPRETED else 4e-3, torch.float16: 1e-3}
"""A unit in the last place of a 16-bit gradient. The interpreter truncates bfloat16 instead of rounding."""


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Tiles hold 64 classes, 256 of rows that are aligned, and lists 16; every row counts as long."""
    from luce.ops.pld import triton
    from luce.ops.pld.triton import top_k
    from luce.ops.triton import launch

    monkeypatch.setattr(triton, "LONGEST", 0)
    monkeypatch.setattr(launch, "TILE", 256)
    monkeypatch.setattr(top_k, "CAPACITY", 16)
    calls = []
    first_k = top_k.first_k
    monkeypatch.setattr(top_k, "first_k", lambda *args: calls.append(first_k(*args)))
    yield
    assert calls


def run(student, teacher, target=None, *, weight=None, backend="gpu", **options):
    """Values, gradient, and the certificates."""
    student = student.detach().requires_grad_()
    values, bound = pld_with_bound(
        student, teacher, target, weight=weight, options=PldOptions(**options), backend=backend
    )
    (gradient,) = torch.autograd.grad(values, student, torch.ones_like(values))
    return values.detach(), gradient, bound


def agree(student, teacher, target=None, **options):
    """With the reference in float64: values, and the gradient over its largest entry in a row."""
    values, gradient, bound = run(student, teacher, target, **options)
    truth, slope, certificate = run(
        student.double(), teacher.double(), target, **{**options, "backend": "reference"}
    )
    assert values.dtype == torch.float32
    assert gradient.dtype == student.dtype
    assert_close(values.double(), truth, rtol=2e-6, atol=1e-11, equal_nan=True)
    allowed = (1e-5 + ROUNDING.get(student.dtype, 0)) * slope.abs().amax(1, keepdim=True) + 1e-11
    assert (((gradient.double() - slope).abs() <= allowed) | truth.isnan()[:, None]).all()
    assert_close(bound.double(), certificate, rtol=1e-4, atol=1e-5)
    return values, gradient


def batch(rows, classes, places, dtype=torch.float32, spread=1.0, device="cpu"):
    """Rows without a label, with one among the first and one among the last classes, in turn."""
    student, teacher = (spread * torch.randn(2, rows, classes, dtype=torch.float64)).to(dtype).to(device)
    order = teacher.double().sort(dim=1, descending=True, stable=True).indices
    target = torch.stack([torch.full_like(order[:, 0], -1), order[:, places // 2], order[:, -1]])
    return student, teacher, target[torch.arange(rows) % 3, torch.arange(rows)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_against_float64(dtype, device):
    student, teacher, target = batch(3, 100, 6, dtype, 2.0, device)
    agree(student, teacher, target, top_k=6)
    agree(student[:1].float(), teacher[:1], target[:1], top_k=5, teacher_temperature=4.0)


@pytest.mark.parametrize(("classes", "places"), [(16, 1), (33, 2), (528, 5)])
def test_any_number_of_places(classes, places, device):
    agree(*batch(3, classes, places, device=device), top_k=places)


@pytest.mark.parametrize("spread", [1e-3, 50.0, 1e4])
def test_every_spread(spread, device):
    agree(*batch(2, 64, 4, spread=spread, device=device), top_k=4)


def hard_teachers(classes):
    """Rows that are hard by the number of classes that reach the bound, or by ties."""
    rising = torch.linspace(-3, 3, classes)
    some = torch.full((classes,), -inf)
    some[[3, 40, 71]] = torch.tensor([0.5, -1.0, 0.5])
    outlier = 1e-3 * torch.randn(classes)
    outlier[classes // 2] = 90.0
    crowded = torch.randn(classes)
    crowded[32:64] += 20
    of_two = torch.where(torch.arange(classes) % 7 == 3, 1.0, 0.0)
    zeros = torch.where(torch.arange(classes) % 2 == 0, -0.0, 0.0)
    return torch.stack(
        [rising, rising.flip(0), zeros, some, outlier, crowded, of_two, crowded.round(), -1e30 * rising]
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("label", [0, 1, 2], ids=["none", "first", "any"])
def test_hard_teachers(dtype, label, device):
    """Every teacher has its turn in both dtypes, with two of the labels."""
    teacher = hard_teachers(100)[(label + (dtype == torch.float32)) % 3 :: 3].to(dtype).to(device)
    student = 3 * torch.randn(teacher.shape).to(dtype).to(device)
    target = (None, teacher.argmax(-1), torch.randint(100, teacher.shape[:1]).to(device))[label]
    agree(student, teacher, target, top_k=6)


@pytest.mark.parametrize("gap", [30, 1000])
def test_what_is_left_is_never_a_difference(gap, device):
    """Far below the head, and above it."""
    student, teacher, target = batch(4, 80, 5, device=device)
    head = torch.zeros_like(student).scatter_(1, teacher.topk(5).indices, float(gap))
    student[:2] += head[:2]
    student[2:] -= head[2:]
    agree(student, teacher, target, top_k=5)


def test_classes_that_are_excluded(device):
    student, teacher, _ = batch(7, 80, 5, device=device)
    head = teacher[0].topk(5).indices
    student[0] = torch.full_like(student[0], -inf).scatter_(0, head, student[0, head] - 1000)
    student[1] = -inf  # but one of the rest
    student[1, teacher[1].argmin()] = 1.0
    student[2, teacher[2].argmax()] = -inf  # costs infinitely much
    student[3], teacher[3] = torch.where(torch.arange(80) % 3 == 0, torch.randn(2, 80), -inf).to(device)
    teacher[4, 2:] = -inf
    student[5], teacher[6] = -inf, -inf
    target = torch.tensor([-1, -1, -1, 3, 79, -1, -1], device=device)
    values, gradient, _ = run(student, teacher, target, top_k=5)
    expected, slope, _ = run(student, teacher, target, top_k=5, backend="reference")
    assert_close(values, expected, equal_nan=True)
    assert values.isinf().sum() >= 1
    finite = expected.isfinite()
    assert_close(gradient[finite], slope[finite], rtol=1e-5, atol=1e-6)
    assert gradient[expected == inf].isfinite().all()
    assert gradient[5:].isnan().all()


def test_rows_without_a_meaning(device):
    student, teacher, _ = batch(8, 40, 2, device=device)
    best = teacher.argmax(-1).tolist()
    student[0, best[0]], student[1, teacher[1].argmin()], teacher[2, 5], teacher[3] = nan, nan, nan, nan
    student[4, 7] = teacher[5, 8] = inf
    target = torch.tensor([-1, 3, -1, 4, -1, -1, 40, 39], device=device)
    values, gradient, _ = run(student, teacher, target, top_k=2)
    assert values.isnan().tolist() == [True] * 7 + [False]
    assert gradient.isnan().all(-1).tolist() == [True] * 7 + [False]


def test_weights_and_strides(device):
    student, teacher, target = batch(4, 50, 3, device=device)
    weight = torch.tensor([1.0, 0.0, -2.0, nan], device=device)
    values, gradient, _ = run(student, teacher, target, top_k=3)
    student[1], target[1] = nan, 99
    across = torch.stack([student, torch.full_like(student, nan)], -1)[..., 0]
    some = run(across, teacher.t().contiguous().t(), target, weight=weight, top_k=3)
    kept = [0, 2]
    assert_close(some[0][kept], (weight * values)[kept])
    assert_close(some[1][kept], (weight[:, None] * gradient)[kept])
    assert some[0][1] == 0
    assert (some[1][1] == 0).all()
    assert some[1][3].isnan().all()


def test_a_vocabulary(monkeypatch, device):
    """Without the fixture's limits; on a device, at a language model's size."""
    from luce.ops.pld.triton import top_k
    from luce.ops.triton import launch

    monkeypatch.setattr(launch, "TILE", 4096)
    monkeypatch.setattr(top_k, "CAPACITY", 256)
    rows, classes, places = (1, 8208, 9) if engines.INTERPRETED else (64, 128256, 128)
    student, teacher, target = batch(rows, classes, places, torch.bfloat16, 2.0, device)
    first = agree(student, teacher, target, top_k=places)
    assert_close(run(student, teacher, target, top_k=places)[:2], first, rtol=0, atol=0)
