"""The native PLD on tensors of every layout and dtype, and on wrong arguments."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.testing import assert_close

from .pld_cases import (
    assert_right,
    assert_same,
    call,
    labels_of,
    native,
    normal,
    rounded_gradients,
    run,
    truth,
)

pytestmark = native

# Layouts and dtypes


def layouts(block):
    """The same numbers, laid out in every way: (name, view)."""
    yield "contiguous", block.contiguous()
    for dims in itertools.permutations(range(block.ndim)):
        back = sorted(range(block.ndim), key=dims.__getitem__)
        yield f"order {dims}", block.permute(dims).contiguous().permute(back)
    wide = torch.full([2 * size + 1 for size in block.shape], -9).to(block.dtype)
    inside = wide[tuple(slice(1, None, 2) for _ in block.shape)]
    yield "sliced", inside.copy_(block)
    yield "narrowed", torch.cat([block, block], 1)[:, : block.shape[1]]


@pytest.mark.parametrize("shape", [(5, 9), (3, 9, 21), (2, 1500, 3), (2, 1, 18), (1, 40, 1), (33, 2, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layouts(shape, dtype):
    """Every layout of one network beside every layout of the other."""
    student, teacher = torch.randn(shape), torch.randn(shape).to(dtype)
    rows = shape[:1] + shape[2:]
    target, weight = torch.randint(-1, shape[1], rows), torch.rand(rows).round(decimals=1)
    expected = run(student, teacher, target, weight=weight, backend="reference")
    order = teacher.sort(dim=1, descending=True, stable=True).indices
    for (name, s), (other, t) in itertools.product(layouts(student), layouts(teacher)):
        values, gradient, _ = run(s, t, target, weight=weight)
        assert_close(
            values, expected[0], rtol=1e-5, atol=1e-6, msg=lambda m, n=name, o=other: f"{n}/{o}: {m}"
        )
        assert_close(
            gradient, expected[1], rtol=1e-4, atol=1e-6, msg=lambda m, n=name, o=other: f"{n}/{o}: {m}"
        )
        narrow, slope, _ = run(s.to(dtype), t, target, weight=weight)
        wide, rounded, _ = run(student.to(dtype).float(), t, target, weight=weight)
        assert_same(narrow, wide)
        assert_same(slope, rounded.to(dtype))
    for _, places in layouts(order):
        values, gradient, _ = run(student, teacher, target, weight=weight, order=places)
        assert_close(values, expected[0], rtol=1e-5, atol=1e-6)
        assert_close(gradient, expected[1], rtol=1e-4, atol=1e-6)


def test_expanded_logits():
    one, row = torch.randn(1, 7), torch.randn(3, 7)
    values, gradient, _ = run(one.expand(3, 7), row)
    assert_close(values, run(one.repeat(3, 1), row)[0])
    assert_close(gradient, run(one.repeat(3, 1), row)[1])
    column = torch.randn(3, 1)
    for student, teacher in ((column.expand(3, 7), row), (row, column.expand(3, 7)), (row, one.expand(3, 7))):
        for result, expected in zip(
            run(student, teacher), run(student.contiguous(), teacher.contiguous()), strict=True
        ):
            assert_same(result, expected)
    pixels = torch.randn(2, 5, 1).expand(2, 5, 40)
    assert_same(run(pixels, pixels)[1], run(pixels.contiguous(), pixels.contiguous())[1])


@pytest.mark.parametrize("shape", [(0, 5), (0, 5, 3), (4, 5, 0)])
def test_no_rows(shape):
    rows = shape[:1] + shape[2:]
    student, target = torch.randn(shape), torch.zeros(rows, dtype=torch.long)
    order = torch.zeros(shape, dtype=torch.int32)
    values, gradient, bound = run(student, student, target, weight=torch.ones(rows), order=order)
    assert (values.shape, gradient.shape, bound.shape) == (rows, shape, (0, 2))


FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.mark.parametrize(("of_student", "of_teacher"), list(itertools.product(FLOATS, FLOATS)))
def test_dtypes(of_student, of_teacher):
    for classes in (7, 1000, 1500):
        student, teacher = (
            x.to(d) for x, d in zip(normal(6, classes), (of_student, of_teacher), strict=True)
        )
        target = labels_of(teacher)
        values, gradient, bound = run(student, teacher, target)
        wide = torch.float64 if torch.float64 in (of_student, of_teacher) else torch.float32
        assert (values.dtype, bound.dtype, gradient.dtype) == (wide, wide, of_student)
        v, g, _ = run(student.to(wide), teacher.to(wide), target)
        assert_same(values, v)
        assert_same(gradient, g.to(of_student))
        assert_right((v, g), truth(student, teacher, target))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_number_of_sixteen_bits(dtype):
    """Read and written as PyTorch itself does, the smallest and those that overflow among them."""
    every = torch.arange(65536).to(torch.uint16).view(dtype).reshape(64, 1024)
    every = every[:, torch.randperm(1024)]
    zero = torch.zeros(64, 1024)
    for weight in (None, torch.full((64,), 1e7), torch.full((64,), 1e-3)):
        for student, teacher in ((zero.to(dtype), every), (every, zero), (every.t(), zero.t())):
            rows = student.shape[0]
            w = None if weight is None else weight[:1].expand(rows).contiguous()
            values, gradient, _ = run(student, teacher, weight=w)
            v, g, _ = run(student.float(), teacher.float(), weight=w)
            assert_same(values, v)
            assert_same(gradient, g.to(student.dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_round_to_even(dtype):
    assert_same(*rounded_gradients(dtype))


def test_a_tile_of_one_network_beside_rows_of_the_other():
    """In a new thread, whose scratch memory is still empty."""
    student, teacher = torch.randn(1, 30000, 16), torch.randn(1, 16, 30000).bfloat16().transpose(1, 2)
    expected = run(student, teacher.float().contiguous())
    with ThreadPoolExecutor(1) as pool:
        in_a_thread = pool.submit(run, student, teacher).result()
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(run, teacher, student).result()
    for one, two in zip(in_a_thread, expected, strict=True):
        assert_same(one, two)
    assert_same(other[0], run(teacher.float().contiguous(), student)[0])


# Wrong arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"student": torch.randn(4)}, "`student` of shape"),
        ({"student": torch.randn(3, 4, 1, 1)}, "`student` of shape"),
        ({"student": torch.tensor(1.0)}, "`student` of shape"),
        ({"teacher": torch.randn(4)}, "`teacher` of shape"),
        ({"teacher": torch.randn(3, 5)}, "`teacher` of the same shape"),
        ({"teacher": torch.randn(2, 4)}, "`teacher` of the same shape"),
        ({"teacher": torch.randn(3, 4, 2)}, "`teacher` of the same shape"),
        ({"student": torch.zeros(3, 4, dtype=torch.long)}, "`student` of a floating dtype"),
        ({"teacher": torch.zeros(3, 4, dtype=torch.int32)}, "`teacher` of a floating dtype"),
        ({"teacher": torch.zeros(3, 4, dtype=torch.bool)}, "`teacher` as float32"),
        ({"teacher": torch.zeros(3, 4, dtype=torch.complex64)}, "`teacher` as float32"),
        ({"student": torch.randn(3, 0), "teacher": torch.randn(3, 0)}, "at least one class"),
        ({"target": torch.zeros(3, dtype=torch.int32)}, "`target` as one number a row"),
        ({"target": torch.zeros(3)}, "`target` as one number a row"),
        ({"target": torch.zeros(2, dtype=torch.long)}, "`target` as one number a row"),
        ({"target": torch.zeros(6, dtype=torch.long)[::2]}, "`target` as one number a row"),
        ({"weight": torch.zeros(3, dtype=torch.float64)}, "`weight` as one number a row"),
        ({"weight": torch.zeros(4)}, "`weight` as one number a row"),
        ({"weight": torch.zeros(1).expand(3)}, "`weight` as one number a row"),
        ({"order": torch.zeros(3, 4)}, "`order` of int64 or int32"),
        ({"order": torch.zeros(3, 5, dtype=torch.long)}, "`order` of the same shape"),
        ({"order": torch.zeros(3, dtype=torch.long)}, "`order` of shape"),
        ({"order": torch.tensor([[0, 1, 2, 3]]).expand(3, 4) + 1}, "every class once"),
        ({"order": torch.tensor([[0, 1, 2, 2]]).expand(3, 4)}, "every class once"),
        ({"order": torch.tensor([[0, 1, 2, -1]]).expand(3, 4)}, "every class once"),
        ({"order": torch.tensor([[0, 1, 2, 2**40]]).expand(3, 4)}, "every class once"),
        (
            {"order": torch.tensor([[0, 1, 2, -(2**31)]], dtype=torch.int32).expand(3, 4)},
            "hold every class once",
        ),
    ],
)
def test_wrong_arguments_raise(arguments, message):
    with pytest.raises(RuntimeError, match=message):
        call(**arguments)


def test_an_order_may_be_wrong_in_one_row_only():
    order = torch.arange(4).repeat(3, 1)
    order[2, 0] = 3
    with pytest.raises(RuntimeError, match="every class once"):
        call(order=order)
    assert call(order=order, weight=torch.tensor([1.0, 1.0, 0.0]))[0][2] == 0  # not looked at
    with pytest.raises(RuntimeError, match="every class once"):
        call(order=order, target=torch.full((3,), 3))
