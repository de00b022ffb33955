"""PLD in Triton: against float64, and the contract of the operator, with the order from either source."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch.testing import assert_close

import luce
from luce.ops import engines
from luce.ops.pld import PldOptions, pld_with_bound, teacher_order

pytestmark = [] if engines.INTERPRETED else [pytest.mark.gpu]

inf, nan = math.inf, math.nan
VALUE, GRADIENT = 2e-6, 1e-5
ROUNDING = {torch.bfloat16: 8e-3 if engines.INTERPRETED else 4e-3, torch.float16: 1e-3}
"""A unit in the last place of a 16-bit gradient. The interpreter truncates bfloat16 instead of rounding."""


@pytest.fixture(params=["registers", "memory"])
def where(request, monkeypatch):
    """The order is in the registers of several threads, or in memory and read 8 places at a time."""
    from luce.ops.pld import triton
    from luce.ops.triton import launch

    monkeypatch.setattr(triton, "EACH", 4)
    if request.param == "memory":
        monkeypatch.setattr(triton, "LONGEST", 0)
        monkeypatch.setattr(launch, "TILE", 8)


def run(student, teacher, target=None, *, weight=None, order=None, backend="gpu", upstream=None, **options):
    """Values, gradient, and the certificates."""
    student = student.detach().requires_grad_()
    values, bound = pld_with_bound(
        student, teacher, target, weight=weight, order=order, options=PldOptions(**options), backend=backend
    )
    upstream = torch.ones_like(values) if upstream is None else upstream
    (gradient,) = torch.autograd.grad(values, student, upstream)
    return values.detach(), gradient, bound


def agree(student, teacher, target=None, *, value=VALUE, gradient=GRADIENT, **options):
    """With the reference in float64: values, and the gradient over its largest entry in a row."""
    result = run(student, teacher, target, **options)
    truth, slope, _ = run(student.double(), teacher.double(), target, **{**options, "backend": "reference"})
    assert result[0].dtype == torch.promote_types(
        torch.promote_types(student.dtype, teacher.dtype), torch.float32
    )
    assert result[1].dtype == student.dtype
    noise = 1e-11 if result[0].dtype == torch.float32 else 1e-15
    assert_close(result[0].double(), truth, rtol=value, atol=noise, equal_nan=True)
    allowed = (gradient + ROUNDING.get(student.dtype, 0)) * slope.abs().amax(1, keepdim=True) + noise
    assert (((result[1].double() - slope).abs() <= allowed) | truth.isnan().unsqueeze(1)).all()
    return result


def batch(*shape, dtype=torch.float32, spread=1.0, device="cpu"):
    student, teacher = (spread * torch.randn(2, *shape, dtype=torch.float64)).to(dtype).to(device)
    target = torch.randint(shape[1], shape[:1] + shape[2:]).to(device)
    if target.numel():
        target.view(-1)[0] = -1
    return student, teacher, target


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("classes", [1, 2, 13])
def test_against_float64(classes, dtype, where, device):
    precise = {"value": 1e-12, "gradient": 1e-12} if dtype == torch.float64 else {}
    agree(*batch(3, classes, dtype=dtype, device=device), **precise)


@pytest.mark.parametrize(
    ("longest", "dtype"),
    [(4096, torch.float32), (4096, torch.bfloat16), (4096, torch.float16), (0, torch.float32)],
    ids=["float32", "bfloat16", "float16", "memory"],
)
def test_many_places_to_a_thread(longest, dtype, monkeypatch, device):
    """Several threads hold several places each, and in memory there are several tiles of them."""
    from luce.ops.pld import triton
    from luce.ops.triton import launch

    monkeypatch.setattr(triton, "LONGEST", longest)
    if not longest:
        monkeypatch.setattr(launch, "TILE", 16)
    agree(*batch(2, 70, dtype=dtype, spread=20.0, device=device))


@pytest.mark.parametrize("shape", [(5, 6), (2, 6, 5)], ids=str)
def test_long_rows_are_done_in_parts(shape, monkeypatch, device):
    from luce.ops.pld import triton

    student, teacher, target = batch(*shape, device=device)
    weight = torch.rand(target.shape).to(device)
    order = teacher.argsort(dim=1, descending=True, stable=True)
    whole = run(student, teacher, target, weight=weight)
    monkeypatch.setattr(triton, "LONGEST", 0)
    for largest, given in ((12, order), (30, None)):
        monkeypatch.setattr(triton, "LARGEST", largest)
        assert all(student[part].numel() <= largest for _, part in triton._parts(student))
        parts = run(student, teacher, target, weight=weight, order=given)
        assert_close(parts[:2], whole[:2], rtol=1e-6, atol=1e-6)
        assert (parts[2] == 0).all()
    with torch.no_grad():
        values, _ = pld_with_bound(student, teacher, target, weight=weight, backend="gpu")
    assert_close(values, parts[0], rtol=0, atol=0)


@pytest.mark.parametrize("options", [{"top_k": 5}, {"teacher_temperature": 4.0}, {"tolerance": 0.1}], ids=str)
@pytest.mark.parametrize("spread", [1.0, 1e4])
def test_options_at_every_spread(options, spread, where, device):
    student, teacher, target = batch(4, 10, spread=spread, device=device)
    teacher[2:] = (teacher[2:] / spread).round() * spread  # ties: the lower class first
    expected = {name: value for name, value in options.items() if name != "tolerance"}
    result = agree(student, teacher, target, **expected)
    if "tolerance" in options:
        assert_close(run(student, teacher, target, **options), result, rtol=0, atol=0)
        assert (result[2] == 0).all()


@pytest.mark.parametrize("gap", [30, 95, 1000])
def test_one_logit_far_above_the_rest(gap, where, device):
    student, teacher, target = batch(4, 10, device=device)
    student[:, 3] += gap
    target[1:] = 3
    agree(student, teacher, target)


def test_certain_students(where, device):
    """The losses are small: each choice is almost certain."""
    _, teacher, target = batch(4, 9, device=device)
    target = teacher.argmax(-1)
    agree(40 * teacher, teacher, target)
    agree(8 * teacher, teacher, target)
    rows = torch.tensor([[0.0, -12.0], [-20.0, 0.0]], device=device)
    agree(rows, rows / 10)


@pytest.mark.parametrize("index", [torch.int64, torch.int32], ids=str)
def test_a_given_order(index, device):
    student, teacher, target = batch(4, 9, device=device)
    order = torch.stack([torch.randperm(9) for _ in range(4)]).to(device)
    target[2], target[3] = order[2, 0], order[3, -1]
    for options in ({}, {"top_k": 5}):
        truth, slope, _ = run(
            student.double(), teacher.double(), target, order=order, backend="reference", **options
        )
        for given in (order.to(index), order.to(index).t().contiguous().t()):
            values, gradient, _ = run(student, teacher, target, order=given, **options)
            assert_close(values.double(), truth, rtol=VALUE, atol=1e-11)
            assert_close(gradient.double(), slope, rtol=GRADIENT, atol=1e-6)


@pytest.mark.parametrize(
    "wrong", [[9], [-1], [0], [5, 5, 6, 6]], ids=["beyond", "negative", "twice", "twice, the sum being right"]
)
def test_an_order_that_is_none_spoils_its_row(wrong, device):
    """Asking would stall the device."""
    student, teacher, _ = batch(3, 9, device=device)
    order = teacher_order(teacher)
    order[1] = torch.arange(9, device=device)
    order[1, 4 : 4 + len(wrong)] = torch.tensor(wrong, device=device)
    values, gradient, _ = run(student, teacher, order=order)
    assert values.isnan().tolist() == [False, True, False]
    assert gradient.isnan().all(-1).tolist() == [False, True, False]


@pytest.mark.parametrize("shape", [(2, 5, 3), (0, 5), (2, 5, 0)], ids=str)
def test_blocks_of_any_strides(shape, where, device):
    student, teacher, target = batch(*shape, device=device)
    for change in (
        lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
        lambda x: torch.stack([x, torch.full_like(x, nan)], -1)[..., 0],
        lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1),
    ):
        values, _, bound = agree(change(student), change(teacher), target)
        assert values.shape == target.shape
        assert bound.shape == (target.numel(), 2)


def test_weights(where, device):
    student, teacher, target = batch(5, 6, device=device)
    weight = torch.tensor([1.0, 0.25, 0.0, -2.0, nan], device=device)
    values, gradient, _ = run(student, teacher, target)
    student[2], target[2] = nan, 99
    some = run(student, teacher, target, weight=weight)
    kept = [0, 1, 3]
    assert_close(some[0][kept], (weight * values)[kept])
    assert_close(some[1][kept], (weight[:, None] * gradient)[kept])
    assert some[0][2] == 0
    assert (some[1][2] == 0).all()
    assert (some[2][2] == 0).all()
    assert some[1][4].isnan().all()


def test_rows_without_a_meaning(where, device):
    """NaN, plus infinity, a network that excludes every class, and a label that does not exist."""
    student, teacher, _ = batch(11, 5, device=device)
    student[0, -1] = teacher[1, 0] = inf
    student[2], teacher[3] = -inf, -inf
    student[6, 1] = teacher[6, 1] = -inf
    student[7, 2] = teacher[8, 3] = nan
    target = torch.tensor([-1, -1, -1, -1, 5, -2, 1, 1, 0, 1, -1], device=device)
    values, gradient, bound = run(student, teacher, target)
    assert values.isnan().tolist() == [True] * 9 + [False] * 2
    assert gradient.isnan().all(-1).tolist() == [True] * 9 + [False] * 2
    assert bound.isnan().all(-1).tolist() == [True] * 9 + [False] * 2


def test_excluded_by_both_is_deleted(where, device):
    student, teacher, target = batch(3, 9, device=device)
    gone = torch.tensor([True, False, True, False, False, True, False, False, True], device=device)
    kept = (~gone).nonzero().flatten()
    target[1:] = kept[torch.tensor([0, 3])]
    student[:, gone] = teacher[:, gone] = -inf
    values, gradient, _ = run(student, teacher, target)
    place = torch.where(target < 0, -1, (kept == target[:, None]).long().argmax(-1))
    expected = run(student[:, kept], teacher[:, kept], place)
    assert (gradient[:, gone] == 0).all()
    assert_close(values, expected[0])
    assert_close(gradient[:, kept], expected[1])


@pytest.mark.parametrize("teacher", [[0.0, -inf, 3.0, -inf], [-2000.0, 0.0, -2001.0, 1.0]], ids=str)
def test_excluded_classes_of_every_sort(teacher, where, device):
    """All rows at once: whom the student excludes, and which label there is."""
    students = [
        s for s in itertools.product([0.5, -inf], [100.0, -inf], [0.0, -inf], [2.0, -inf]) if max(s) > -inf
    ]
    rows = [(s, label) for s in students for label in (-1, 1, 2)]
    student = torch.tensor([s for s, _ in rows], device=device)
    target = torch.tensor([label for _, label in rows], device=device)
    teacher = torch.tensor([teacher] * len(rows), device=device)
    for options in ({}, {"top_k": 2}):
        values, gradient, _ = run(student, teacher, target, **options)
        expected, slope, _ = run(student, teacher, target, backend="reference", **options)
        assert_close(values, expected, equal_nan=True)
        finite = expected.isfinite()
        assert_close(gradient[finite], slope[finite], rtol=1e-5, atol=1e-6)
        assert gradient[expected == inf].isfinite().all()


@pytest.mark.parametrize("largest", [3e38, 1e30])
def test_enormous_logits(largest, where, device):
    rows = torch.tensor([[largest / 4, -largest / 4, 0.0, 0.25], [0.0, 1.0, 2.0, 3.0]], device=device)
    for student, teacher in (rows, rows.flip(0)):
        values, gradient, _ = run(student[None], teacher[None])
        expected = run(student[None].double(), teacher[None].double(), backend="reference")[0]
        assert_close(values.double(), expected, rtol=VALUE, atol=0)
        assert_close(gradient.sum(), gradient.new_zeros(()))
        assert run(4 * student[None], 4 * teacher[None])[1].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_both_ways_agree_on_the_order(dtype, device):
    """Zeros of both signs are equal, and so are neighbours in bfloat16; the lower class goes first."""
    student = torch.randn(4, 13, device=device)
    teacher = torch.zeros(4, 13, device=device)
    teacher[0, ::2] = -0.0
    teacher[1] = torch.randn(13).bfloat16().float().round()
    teacher[2] = torch.arange(13) % 2 - 1e-40
    teacher[3] = -torch.arange(13).float()
    teacher = teacher.to(dtype)
    for target in (None, torch.tensor([3, 0, 12, 5], device=device)):
        own, given = (
            run(student, teacher, target),
            run(student, teacher, target, order=teacher_order(teacher)),
        )
        assert_close(own[:2], given[:2], rtol=1e-6, atol=1e-6)


def test_derivatives(device):
    student, teacher, target = batch(2, 3, dtype=torch.float64, device=device)
    student.requires_grad_()

    def values(s):
        return pld_with_bound(s, teacher, target, backend="gpu")[0]

    torch.autograd.gradcheck(values, student, fast_mode=True)
    torch.autograd.gradgradcheck(values, student, fast_mode=True)
    upstream = torch.tensor([2.0, -1.0], dtype=torch.float64, device=device)
    agree(student, teacher, target, upstream=upstream, value=1e-12, gradient=1e-12)


def test_what_there_is_no_kernel_for(device):
    student, teacher, target = batch(2, 4, device=device)
    for option, why in (({"ties": "average"}, "ties='average'"), ({"epsilon": 0.1}, "epsilon")):
        with pytest.raises(RuntimeError, match=f"there is no Triton kernel for {why}"):
            luce.pld_loss(student, teacher, target, backend="gpu", **option)
        assert luce.pld_loss(student, teacher, target, **option).isfinite()


def test_the_loss_takes_the_kernel(device):
    student, teacher, target = batch(4, 5, 2, device=device)
    target[0, 0] = -100
    found = []
    for backend in ("gpu", "reference"):
        x = student.detach().requires_grad_()
        value = luce.pld_loss(x, teacher, target, backend=backend)
        (3 * value).backward()
        found.append((value.detach(), x.grad))
    assert_close(found[0], found[1])
