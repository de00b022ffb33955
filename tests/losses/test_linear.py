"""Losses on hidden states and a head: those on the logits, without the logits."""

from __future__ import annotations

import copy
import functools
import math
import pickle

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import luce
from luce import LinearLogits, TopKLogits
from luce.losses import teacher_gradient
from luce.ops.linear import rows_per_chunk, stream

ROWS, WIDTH, CLASSES = 7, 3, 11
PAIRS = {luce.linear_kd_loss: luce.kd_loss, luce.linear_pld_loss: luce.pld_loss}
MODULES = {luce.linear_kd_loss: luce.LinearKDLoss, luce.linear_pld_loss: luce.LinearPLDLoss}
OPTIONS = [
    (luce.linear_kd_loss, {}),
    (luce.linear_kd_loss, {"temperature": 2.5}),
    (luce.linear_kd_loss, {"temperature": 2.5, "scale_by_temperature": False, "backend": "reference"}),
    (luce.linear_kd_loss, {"temperature": math.inf}),
    (luce.linear_pld_loss, {}),
    (luce.linear_pld_loss, {"teacher_temperature": 2.0, "backend": "reference"}),
    (luce.linear_pld_loss, {"top_k": 3}),
    (luce.linear_pld_loss, {"epsilon": 0.2}),
    (luce.linear_pld_loss, {"ties": "average"}),
    (luce.linear_pld_loss, {"tolerance": 0.1}),
]
each = pytest.mark.parametrize("loss", PAIRS, ids=lambda f: f.__name__)
each_option = pytest.mark.parametrize(
    ("loss", "options"), OPTIONS, ids=lambda v: getattr(v, "__name__", str(v))
)


def normal(*shape, dtype=torch.float64, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def head(*rows, width=WIDTH, classes=CLASSES, seed=0, bias=True, dtype=torch.float64, **more):
    """Random hidden states and head, all of which want a gradient."""
    tensors = [normal(*rows, width, seed=seed), normal(classes, width, seed=seed + 1)]
    if bias:
        tensors.append(normal(classes, seed=seed + 2))
    return LinearLogits(*(x.to(dtype).requires_grad_() for x in tensors), **more)


def labels(*rows, classes=CLASSES):
    return torch.randint(classes, rows, generator=torch.Generator().manual_seed(9))


def leaves(student):
    return [x for x in (student.hidden, student.weight, student.bias) if x is not None and x.requires_grad]


def value_and_gradients(value, student, upstream=None):
    if upstream is None:
        upstream = torch.tensor(0.7, dtype=value.dtype)
    return value.detach(), torch.autograd.grad(value, leaves(student), upstream)


def unfused(loss, student, teacher, target=None, **options):
    logits = teacher.logits() if isinstance(teacher, LinearLogits) else teacher
    return PAIRS[loss](student.logits(), logits, target, class_dim=-1, **options)


HEADS = {
    "plain": {"bias": False},
    "bias": {},
    "scale": {"scale": 0.25},
    "softcap": {"softcap": 1.5},
    "everything, padded": {"scale": 1.5, "softcap": 2.0, "vocab_size": CLASSES - 4},
}
each_head = pytest.mark.parametrize("settings", HEADS.values(), ids=HEADS)


# The loss on the logits is the oracle


@each_option
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_it_is_the_loss_on_the_logits(loss, options, reduction):
    student, teacher, target = head(ROWS), head(ROWS, width=5, seed=4), labels(ROWS)
    target[2] = -100
    if loss is luce.linear_pld_loss:
        target[4] = luce.UNLABELLED
    weight = torch.rand(ROWS, dtype=torch.float64)
    weight[5] = 0
    shared = {"row_weight": weight, "reduction": reduction, **options}
    upstream = normal(ROWS, seed=8) if reduction == "none" else None
    expected = value_and_gradients(unfused(loss, student, teacher, target, **shared), student, upstream)
    for rows in (1, 3, 64, None):
        found = loss(student, teacher, target, chunk_rows=rows, **shared)
        assert_close(value_and_gradients(found, student, upstream), expected, rtol=1e-10, atol=1e-12)


@each
@each_head
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_every_part_of_a_head(loss, settings, reduction):
    student = head(2, 3, **settings)
    teacher = head(2, 3, width=4, seed=4, **settings)
    target = labels(2, 3, classes=student.classes)
    upstream = normal(2, 3, seed=8) if reduction == "none" else None
    expected = value_and_gradients(
        unfused(loss, student, teacher, target, reduction=reduction), student, upstream
    )
    found = loss(student, teacher, target, reduction=reduction, chunk_rows=4)
    found = value_and_gradients(found, student, upstream)
    assert found[0].shape == ((2, 3) if reduction == "none" else ())
    assert_close(found, expected, rtol=1e-10, atol=1e-12)
    dense = teacher.logits().detach()
    again = value_and_gradients(loss(student, dense, target, reduction=reduction), student, upstream)
    assert_close(again, expected, rtol=1e-10, atol=1e-12)


def test_the_logits_are_those_of_the_formula():
    """cap(scale (x w + b)) with cap(z) = 2 tanh(z / 2), of the classes that are no padding."""
    x, w, b = torch.tensor([[3.0]]), torch.tensor([[0.5], [-1.0], [9.0]]), torch.tensor([0.1, 0.2, 9.0])
    logits = LinearLogits(x, w, b, scale=0.5, softcap=2.0, vocab_size=2)
    expected = [[2 * math.tanh(0.5 * (3 * 0.5 + 0.1) / 2), 2 * math.tanh(0.5 * (3 * -1.0 + 0.2) / 2)]]
    assert_close(logits.logits(), torch.tensor(expected))
    assert logits.shape == (1, 2)


@each
@pytest.mark.parametrize("rows", [0, 1])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_few_rows(loss, rows, reduction):
    student, teacher = head(rows), head(rows, seed=4)
    found = loss(student, teacher, labels(rows), reduction=reduction)
    assert found.shape == ((rows,) if reduction == "none" else ())
    expected = unfused(loss, student, teacher, labels(rows), reduction=reduction)
    upstream = torch.ones_like(found)
    assert_close(
        value_and_gradients(found, student, upstream), value_and_gradients(expected, student, upstream)
    )


@each
def test_a_row_of_its_own(loss):
    student, teacher = head(), head(seed=4)
    assert_close(loss(student, teacher, labels()), unfused(loss, student, teacher, labels(), reduction="sum"))


# Rows that do not count


@each
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_no_row_counts(loss, reduction):
    student, teacher = head(ROWS), head(ROWS, seed=4)
    found = loss(student, teacher, torch.full((ROWS,), -100), reduction=reduction)
    value, gradients = value_and_gradients(found, student, torch.ones_like(found))
    assert (value == 0).all()
    assert all((gradient == 0).all() for gradient in gradients)


@each
def test_rows_that_do_not_count_are_never_multiplied(loss, monkeypatch):
    student, target, weight = head(ROWS), labels(ROWS), torch.ones(ROWS, dtype=torch.float64)
    teacher = head(ROWS, seed=4)
    target[1], weight[3] = -100, 0
    expected = value_and_gradients(loss(student, teacher, target, row_weight=weight, chunk_rows=2), student)
    hidden = student.hidden.detach().clone()
    hidden[[1, 3]] = math.nan
    spoilt = LinearLogits(hidden.requires_grad_(), student.weight, student.bias)
    found = value_and_gradients(loss(spoilt, teacher, target, row_weight=weight, chunk_rows=2), spoilt)
    assert_close(found, expected, rtol=0, atol=0)
    multiplied = []
    product = stream._product
    monkeypatch.setattr(stream, "_product", lambda a, b: multiplied.append(len(a)) or product(a, b))
    with torch.no_grad():
        loss(spoilt, teacher, target, row_weight=weight, chunk_rows=2)
    assert sorted(multiplied) == [1, 1, 2, 2, 2, 2]  # 5 rows of student and teacher


@each
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_where_asking_would_stall_the_device_such_rows_become_0(loss, reduction, monkeypatch):
    student, target, weight = head(ROWS), labels(ROWS), torch.ones(ROWS, dtype=torch.float64)
    teacher = head(ROWS, seed=4)
    target[1], weight[3] = -100, 0

    def everything(student):
        value = loss(student, teacher, target, row_weight=weight, reduction=reduction, chunk_rows=2)
        first = torch.autograd.grad(value.sum(), leaves(student), create_graph=True)
        return value, first, torch.autograd.grad(sum(x.square().sum() for x in first), leaves(student))

    expected = everything(student)
    monkeypatch.setattr(stream, "_is_on_cpu", lambda tensor: False)
    hidden = student.hidden.detach().clone()
    hidden[[1, 3]] = math.nan
    assert_close(everything(LinearLogits(hidden.requires_grad_(), student.weight, student.bias)), expected)


# How it is computed


class Largest(TorchDispatchMode):
    """The most entries that any tensor made inside has room for."""

    def __init__(self):
        super().__init__()
        self.entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in tree_leaves(args) if isinstance(x, torch.Tensor)}
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in given:
                entries = tensor.untyped_storage().nbytes() // tensor.element_size()
                self.entries = max(self.entries, entries)
        return out


@each
@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("kind", ["head", "top_k"])
def test_no_array_of_all_rows_and_classes_is_made(loss, reduction, kind):
    rows, classes, chunk = 60, 500, 5
    student, target = head(rows, width=4, classes=classes), labels(rows, classes=classes)
    teacher = head(rows, width=6, classes=classes, seed=4)
    if kind == "top_k":
        teacher = TopKLogits.of(teacher.logits(), 8)
    with Largest() as seen:
        value = loss(student, teacher, target, reduction=reduction, chunk_rows=chunk)
        value.backward(torch.ones_like(value))
    assert seen.entries == chunk * classes
    with Largest() as seen:
        unfused(luce.linear_kd_loss, student, normal(rows, classes), target)
    assert seen.entries == rows * classes


@pytest.mark.parametrize(
    ("rows", "width", "classes", "expected"),
    [
        (8192, 4096, 128256, 256),  # 261.6
        (8192, 4096, 32000, 1024),  # 1048.6
        (32, 512, 1000, 128),  # 16.4, but a head is not read for so few rows
        (0, 512, 1000, 128),
        (10**6, 1000, 10, 2**27),  # all rows
    ],
)
def test_the_rule_for_chunks(rows, width, classes, expected):
    assert rows_per_chunk(rows, width, classes) == expected
    assert expected & (expected - 1) == 0


@each
def test_only_what_is_asked_for_gets_a_gradient(loss):
    target = labels(ROWS)
    everything = head(ROWS)
    teacher = head(ROWS, seed=4)
    expected = torch.autograd.grad(loss(everything, teacher, target), leaves(everything))
    for asked in range(3):
        tensors = [x.detach() for x in leaves(everything)]
        tensors[asked].requires_grad_()
        (found,) = torch.autograd.grad(loss(LinearLogits(*tensors), teacher, target), tensors[asked])
        assert_close(found, expected[asked], rtol=0, atol=0)
    frozen = LinearLogits(*(x.detach() for x in leaves(everything)))
    assert not loss(frozen, teacher, target).requires_grad
    with torch.no_grad():
        assert not loss(everything, teacher, target).requires_grad
    assert all(x.grad is None for x in leaves(teacher))


@each
def test_no_gradient_of_the_head_is_made_for_a_frozen_one(loss):
    student = head(40, width=8, classes=300, bias=False)
    frozen = LinearLogits(student.hidden, student.weight.detach())
    teacher = head(40, width=8, classes=300, seed=4)
    for given, entries in ((student, 300 * 8), (frozen, 300 * 4)):  # the gradient of the head, or a chunk
        with Largest() as seen:
            loss(given, teacher, chunk_rows=4).backward()
        assert seen.entries == entries


@each
def test_an_embedding_that_is_the_head_too(loss):
    embedding = nn.Embedding(CLASSES, WIDTH, dtype=torch.float64)
    teacher, target = normal(ROWS, CLASSES), labels(ROWS)
    tokens = labels(ROWS).flip(0)
    gradients = []
    for value in (
        lambda hidden: loss(LinearLogits(hidden, embedding.weight), teacher, target),
        lambda hidden: PAIRS[loss](hidden @ embedding.weight.T, teacher, target),
    ):
        embedding.zero_grad()
        value(embedding(tokens).tanh()).backward()
        gradients.append(embedding.weight.grad.clone())
    assert_close(*gradients, rtol=1e-10, atol=1e-12)


@each
@pytest.mark.parametrize(("reduction", "ahead"), [("mean", True), ("none", False)])
def test_gradients_are_computed_where_the_upstream_can_only_scale_them(loss, reduction, ahead, monkeypatch):
    student, teacher, target = head(ROWS), head(ROWS, seed=4), labels(ROWS)
    multiplied = []
    product = stream._product
    monkeypatch.setattr(stream, "_product", lambda a, b: multiplied.append(len(a)) or product(a, b))
    value = loss(student, teacher, target, reduction=reduction)
    assert len(multiplied) == 2 + ahead  # logits of both networks, and what goes back to the hidden states
    value.backward(torch.ones_like(value))
    assert len(multiplied) == (3 if ahead else 5)


@each
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_going_back_twice(loss, reduction):
    """What was computed ahead is handed out once; then it is computed again."""
    student, teacher, target = head(ROWS), head(ROWS, seed=4), labels(ROWS)
    value = loss(student, teacher, target, reduction=reduction)
    upstream = torch.full_like(value, 3.0)
    first, second, third = (
        [x.clone() for x in torch.autograd.grad(value, leaves(student), upstream, retain_graph=True)]
        for _ in range(3)
    )
    assert_close(second, first)
    assert_close(third, second, rtol=0, atol=0)


@each
def test_gradients_add_up_in_place_without_a_trace(loss):
    """Autograd may keep what it is handed: another backward must not change it."""
    student, teacher = head(ROWS), head(ROWS, seed=4)
    for _ in range(2):
        loss(student, teacher, labels(ROWS)).backward()
    expected = torch.autograd.grad(loss(student, teacher, labels(ROWS)), leaves(student))
    assert_close([x.grad for x in leaves(student)], [2 * x for x in expected])


@each
def test_a_weight_changed_before_going_back_is_noticed(loss):
    student = head(ROWS)
    value = loss(student, head(ROWS, seed=4), labels(ROWS))
    with torch.no_grad():
        student.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


@each
def test_row_weights_that_want_a_gradient(loss):
    student, teacher, target = head(ROWS), head(ROWS, seed=4), labels(ROWS)
    weight = torch.rand(ROWS, dtype=torch.float64, requires_grad=True)
    everything = [*leaves(student), weight]
    found = torch.autograd.grad(loss(student, teacher, target, row_weight=weight), everything)
    expected = torch.autograd.grad(unfused(loss, student, teacher, target, row_weight=weight), everything)
    assert_close(found, expected, rtol=1e-10, atol=1e-12)


@each
@each_head
def test_finite_differences(loss, settings):
    student = head(3, **settings)
    teacher = normal(3, student.classes, seed=7)
    target = labels(3, classes=student.classes)
    settings = {name: value for name, value in settings.items() if name != "bias"}

    def value(*tensors):
        return loss(LinearLogits(*tensors, **settings), teacher, target, chunk_rows=2)

    torch.autograd.gradcheck(value, leaves(student))
    torch.autograd.gradgradcheck(value, leaves(student), fast_mode=True)
    for known in (teacher, TopKLogits.of(teacher, 3)):
        by_row = functools.partial(_by_row, loss, settings, known, target)
        torch.autograd.gradcheck(by_row, leaves(student), fast_mode=True)
        torch.autograd.gradgradcheck(by_row, leaves(student), fast_mode=True)


def _by_row(loss, settings, teacher, target, *tensors):
    return loss(LinearLogits(*tensors, **settings), teacher, target, reduction="none", chunk_rows=2)


@each
def test_the_derivative_of_a_gradient_skips_rows_too(loss):
    student, teacher, target = head(ROWS), head(ROWS, seed=4), labels(ROWS)
    target[3] = -100

    def twice(value):
        gradients = torch.autograd.grad(value, leaves(student), create_graph=True)
        return torch.autograd.grad(sum(x.square().sum() for x in gradients), leaves(student))

    found, expected = twice(loss(student, teacher, target)), twice(unfused(loss, student, teacher, target))
    assert_close(found, expected, rtol=1e-9, atol=1e-11)


@each
@pytest.mark.parametrize("kind", ["head", "top_k"])
def test_torch_func(loss, kind):
    student, teacher, target = head(ROWS), head(ROWS, seed=4), labels(ROWS)
    target[3] = -100
    teacher = TopKLogits.of(teacher.logits(), 3) if kind == "top_k" else teacher

    def value(*tensors):
        return loss(LinearLogits(*tensors), teacher, target)

    found = torch.func.grad(value, argnums=(0, 1, 2))(*leaves(student))
    expected = torch.autograd.grad(value(*leaves(student)), leaves(student))
    assert_close(found, expected, rtol=1e-10, atol=1e-12)


@each
def test_under_a_compiler(loss):
    torch.compiler.reset()
    student, teacher, target = head(ROWS), head(ROWS, seed=4), labels(ROWS)

    def step(hidden, weight, target):
        return 2 * loss(LinearLogits(hidden.tanh(), weight), teacher, target)

    wanted = [student.hidden, student.weight]
    expected = torch.autograd.grad(step(*wanted, target), wanted)
    found = torch.autograd.grad(torch.compile(step, backend="aot_eager")(*wanted, target), wanted)
    assert_close(found, expected, rtol=1e-10, atol=1e-12)


@each
def test_checkpointed(loss):
    student, teacher, target = head(ROWS), head(ROWS, seed=4), labels(ROWS)

    def value(*tensors):
        return loss(LinearLogits(*tensors), teacher, target)

    again = torch.utils.checkpoint.checkpoint(value, *leaves(student), use_reentrant=False)
    expected = torch.autograd.grad(value(*leaves(student)), leaves(student))
    assert_close(torch.autograd.grad(again, leaves(student)), expected, rtol=0, atol=0)


@each
def test_under_ddp(loss, tmp_path):
    """The head is read where the wrapped model is not called; its gradient is shared all the same."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(4, WIDTH), nn.Linear(WIDTH, CLASSES)

        def forward(self, x):
            return self.body(x).tanh()

    model, x = Model(), torch.randn(ROWS, 4)
    teacher, target = torch.randn(ROWS, CLASSES), labels(ROWS)
    expected = torch.autograd.grad(
        PAIRS[loss](model.head(model(x)), teacher, target), list(model.parameters())
    )
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(model)
        loss(LinearLogits(wrapped(x), model.head.weight, model.head.bias), teacher, target).backward()
    finally:
        torch.distributed.destroy_process_group()
    assert_close([p.grad for p in model.parameters()], list(expected))


# Precision


def rms(x):
    return x.square().mean().sqrt().item()


@pytest.fixture(params=["wide", "narrow"])
def factors(request, monkeypatch):
    """Of products: in float32, as on a CPU, or in 16 bits, as on CUDA."""
    if request.param == "narrow":
        monkeypatch.setattr(stream, "_product_dtype", lambda of, autocast: of.hidden.dtype)
    return request.param


@each
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_16_bit_gradients_are_off_by_no_more_than_twice_the_rounding_of_the_inputs(
    loss, dtype, reduction, factors
):
    rows, width, classes = 64, 32, 200
    exact = [3 * normal(rows, width, seed=1), normal(classes, width, seed=2) / width**0.5, normal(classes)]
    teacher, target = 4 * normal(rows, classes, seed=3), labels(rows, classes=classes)
    upstream = torch.ones((rows,) if reduction == "none" else (), dtype=torch.float64)

    def gradients(tensors, teacher, dtype):
        tensors = [x.to(dtype).requires_grad_() for x in tensors]
        value = loss(LinearLogits(*tensors), teacher.to(dtype), target, reduction=reduction, chunk_rows=16)
        assert value.dtype == torch.promote_types(dtype, torch.float32)
        found = torch.autograd.grad(value, tensors, upstream.to(value.dtype))
        assert all(x.dtype == dtype for x in found)
        return [x.double() for x in found]

    rounded, teacher = [x.to(dtype) for x in exact], teacher.to(dtype)
    truth = gradients(exact, teacher.double(), torch.float64)
    of_rounded = gradients(rounded, teacher.double(), torch.float64)
    found = gradients(rounded, teacher, dtype)
    for f, r, t in zip(found, of_rounded, truth, strict=True):
        assert rms(f - r) <= 2 * rms(r - t)
        if factors == "wide":
            assert rms(f - r) <= torch.finfo(dtype).eps * rms(r)  # nothing but the last rounding is seen


@each
@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_float16_gradients_too_small_for_it_wait_for_the_scaler(loss, factors, reduction):
    """Each row of a mean over very many has a gradient that float16 would lose; the scale comes later."""
    student, teacher = (head(64, dtype=torch.float16, seed=seed) for seed in (0, 4))
    wide, wide_teacher = (
        LinearLogits(*(x.detach().double().requires_grad_() for x in leaves(y))) for y in (student, teacher)
    )
    target, weight = labels(64), torch.full((64,), 2.0**-24)

    def scaled(student, teacher):
        values = 2.0**24 * loss(student, teacher, target, row_weight=weight, reduction=reduction).sum()
        return values.detach().double(), *(x.double() for x in torch.autograd.grad(values, leaves(student)))

    for found, expected in zip(scaled(student, teacher), scaled(wide, wide_teacher), strict=True):
        assert rms(found - expected) <= 2e-3 * rms(expected)


@each
def test_16_bit_gradients_of_several_chunks_are_multiplied_together(loss, monkeypatch):
    monkeypatch.setattr(stream, "_product_dtype", lambda of, autocast: of.hidden.dtype)
    monkeypatch.setattr(stream, "ROWS_TOGETHER", 5)
    added = []
    add = stream._add_product
    monkeypatch.setattr(
        stream, "_add_product", lambda total, a, b: added.append(a.shape[1]) or add(total, a, b)
    )
    student, teacher, target = head(11, dtype=torch.bfloat16), normal(11, CLASSES), labels(11)
    target[0] = -100
    some, whole = (
        torch.autograd.grad(loss(student, teacher, target, chunk_rows=rows), leaves(student))
        for rows in (2, 11)
    )
    assert added == [4, 4, 2, 10]
    for a, b in zip(some, whole, strict=True):
        assert rms(a.double() - b.double()) <= 2e-3 * rms(b.double())


@each
def test_many_chunks_add_up_in_float32(loss):
    """Added up in bfloat16, the small parts of many chunks would be lost."""
    student = head(512, dtype=torch.bfloat16)
    teacher, target = normal(512, CLASSES, dtype=torch.bfloat16), labels(512)
    one, many = (
        torch.autograd.grad(loss(student, teacher, target, chunk_rows=rows), leaves(student))
        for rows in (512, 1)
    )
    for a, b in zip(one, many, strict=True):
        assert rms(a.double() - b.double()) <= 2e-3 * rms(a.double())  # one rounding may go the other way


@each
def test_under_autocast(loss):
    student, teacher, target = (
        head(ROWS, dtype=torch.float32),
        head(ROWS, seed=4, dtype=torch.float32),
        labels(ROWS),
    )
    expected = value_and_gradients(loss(student, teacher, target), student)
    with torch.autocast("cpu", torch.bfloat16):
        narrow = LinearLogits(student.hidden.bfloat16(), student.weight, student.bias)
        mixed = loss(narrow, teacher, target)
        found = value_and_gradients(loss(student, teacher, target), student)
    assert_close(found, expected, rtol=0.05, atol=0.02)
    assert found[0].dtype == torch.float32
    gradients = torch.autograd.grad(mixed, leaves(student), torch.tensor(0.7))  # outside, as usual
    assert [x.dtype for x in gradients] == [torch.float32] * 3
    assert_close(gradients, expected[1], rtol=0.05, atol=0.02)


@each
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["f32", "bf16", "f16"])
@pytest.mark.parametrize("kind", ["head", "top_k"])
def test_a_gpu_agrees_with_the_cpu(loss, dtype, kind):
    student, teacher, target = (
        head(64, width=16, dtype=dtype),
        head(64, width=8, seed=4, dtype=dtype),
        labels(64),
    )
    target[3] = -100
    kept = TopKLogits.of(teacher.logits(), 4)
    results = []
    for device in ("cpu", "cuda"):
        here = LinearLogits(*(x.detach().to(device).requires_grad_() for x in leaves(student)))
        there = LinearLogits(*(x.detach().to(device) for x in leaves(teacher)))
        if kind == "top_k":
            there = TopKLogits(kept.ids.to(device), kept.logits.to(device), kept.rest.to(device))
        value = loss(here, there, target.to(device), chunk_rows=16)
        results.append([x.double().cpu() for x in (value, *torch.autograd.grad(value, leaves(here)))])
    for found, expected in zip(results[1], results[0], strict=True):
        assert rms(found - expected) <= max(1e-5, 2 * torch.finfo(dtype).eps) * rms(expected)


@each
@pytest.mark.gpu
def test_a_gpu_is_asked_nothing(loss):
    """So that both ways can be captured in a CUDA graph."""
    student, teacher = (head(64, width=16, seed=seed, dtype=torch.bfloat16) for seed in (0, 4))
    student = LinearLogits(*(x.detach().cuda().requires_grad_() for x in leaves(student)))
    teacher = LinearLogits(*(x.detach().cuda() for x in leaves(teacher)))
    target = labels(64).cuda()
    target[3] = -100
    expected = torch.autograd.grad(loss(student, teacher, target, chunk_rows=16), leaves(student))
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = torch.autograd.grad(loss(student, teacher, target, chunk_rows=16), leaves(student))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_close(found, expected, rtol=0, atol=0)


# A teacher of which little is left


def top_k_oracle(student, logits, kept, target):
    """PLD of the kept places written out: every suffix is summed anew over what is not placed yet."""
    total = []
    for s, t, ids, label in zip(student, logits, kept.ids.tolist(), target.tolist(), strict=True):
        places = sorted(ids, key=lambda i: (-t[i].item(), i))
        alpha = t.softmax(-1)
        if label >= 0:
            places = [label, *(i for i in places if i != label)]
        left, row = set(range(len(s))), 0
        for i in places:
            if i in ids:
                row = row + alpha[i] * (s[sorted(left)].logsumexp(-1) - s[i])
            left.remove(i)
        total.append(row)
    return torch.stack(total)


@pytest.mark.parametrize("k", [1, 4, CLASSES])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_top_k_with_the_label_kept_is_pld_with_top_k(k, temperature):
    student, logits, target = head(20), 2 * normal(20, CLASSES, seed=6), labels(20)
    target[3] = luce.UNLABELLED
    kept = TopKLogits.of(logits, k, target, temperature=temperature)
    options = {"teacher_temperature": temperature, "reduction": "sum"}
    found = luce.linear_pld_loss(student, kept, target, chunk_rows=6, **options)
    expected = luce.pld_loss(student.logits(), logits, target, top_k=k, **options)
    assert_close(
        value_and_gradients(found, student), value_and_gradients(expected, student), rtol=1e-10, atol=1e-12
    )


def test_top_k_ranks_the_lower_class_first_among_equals():
    student, logits = head(20), normal(20, CLASSES, seed=6).round()
    best = TopKLogits.of(logits, CLASSES)
    found = [
        luce.linear_pld_loss(
            student, TopKLogits(best.ids[:, i], best.logits[:, i], best.rest), reduction="none"
        )
        for i in (torch.randperm(CLASSES), torch.arange(CLASSES))
    ]
    expected = luce.pld_loss(student.logits(), logits, reduction="none")
    assert_close(found, [expected, expected])


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_top_k_against_a_second_implementation(backend):
    student, logits, target = head(20), 2 * normal(20, CLASSES, seed=6), labels(20)
    target[3] = luce.UNLABELLED
    kept = TopKLogits.of(logits, 3)
    shuffled = torch.randperm(3)
    kept = TopKLogits(kept.ids[:, shuffled], kept.logits[:, shuffled], kept.rest)  # in any order
    assert not (kept.ids == target[:, None]).any(-1).all()
    found = luce.linear_pld_loss(student, kept, target, reduction="none", backend=backend)
    expected = top_k_oracle(student.logits(), logits, kept, target)
    upstream = normal(20, seed=5)
    assert_close(
        value_and_gradients(found, student, upstream),
        value_and_gradients(expected, student, upstream),
        rtol=1e-10,
        atol=1e-12,
    )


def test_what_a_label_that_was_not_kept_costs_at_most():
    """Of the loss with the label kept too, its own term is missing: alpha (log Z - u), alpha <= 1/(K+1)."""
    student, logits = head(50), normal(50, CLASSES, seed=6)
    kept = TopKLogits.of(logits, 3)
    target = logits.argmin(-1)
    found = luce.linear_pld_loss(student, kept, target, reduction="none")
    with_label = TopKLogits.of(logits, 4, target)
    full = luce.linear_pld_loss(student, with_label, target, reduction="none")
    alpha = logits.softmax(-1).gather(-1, target[:, None])[:, 0]
    cross_entropy = luce.cross_entropy_loss(student.logits(), target, reduction="none")
    assert_close(full - found, alpha * cross_entropy)
    assert (alpha <= 1 / 4).all()


@pytest.mark.parametrize("temperature", [1.0, 0.5, 4.0])
@pytest.mark.parametrize("k", [1, 4, CLASSES])
def test_top_k_kd_is_kd_of_the_kept_and_one_for_the_rest(k, temperature):
    student, logits = head(ROWS), 2 * normal(ROWS, CLASSES, seed=6)
    kept = TopKLogits.of(logits, k, temperature=temperature)
    found = luce.linear_kd_loss(student, kept, temperature=temperature, chunk_rows=3)

    def merged(x):
        p = (x / temperature).softmax(-1)
        first = p.gather(-1, kept.ids)
        others = p.scatter(-1, kept.ids, 0).sum(-1, keepdim=True)
        return torch.cat([first, others], dim=-1)[:, : k + (k < CLASSES)]

    p, q = merged(logits), merged(student.logits())
    expected = temperature**2 * (p * (p.log() - q.log())).sum(-1).mean()
    assert_close(
        value_and_gradients(found, student), value_and_gradients(expected, student), rtol=1e-9, atol=1e-11
    )
    full = luce.kd_loss(student.logits(), logits, temperature=temperature)
    assert 0 <= found <= full + 1e-12
    if k == CLASSES:
        assert_close(found, full, rtol=1e-10, atol=1e-12)


def test_nothing_is_kept_of_the_logits_that_were_not():
    kept = TopKLogits.of(normal(50, 40), 3, labels(50))
    unlabelled = TopKLogits.of(normal(50, 40), 3)
    sizes = [x.untyped_storage().nbytes() for k in (kept, unlabelled) for x in (k.ids, k.logits, k.rest)]
    assert sizes == 2 * [50 * 3 * 8, 50 * 3 * 8, 50 * 8]


@each
def test_log_probabilities_do_as_well_as_logits(loss):
    student, logits, target = head(ROWS), normal(ROWS, CLASSES, seed=6), labels(ROWS)
    found = [loss(student, TopKLogits.of(x, 4), target) for x in (logits, logits.log_softmax(-1), logits + 7)]
    assert_close(found[1], found[0])
    assert_close(found[2], found[0])


@each
def test_a_tail_that_is_nothing_beside_the_kept(loss):
    """1 - sum of the others would leave no digits: the student's tail is e**-60 of its head, in float32."""
    weight = torch.tensor([[60.0], [59.0], [0.0], [-1.0]])
    student = LinearLogits(torch.ones(1, 1, requires_grad=True), weight)
    kept = TopKLogits(torch.tensor([[1, 0]]), torch.tensor([[0.3, 0.1]]), torch.tensor([-0.5]))
    wide = LinearLogits(torch.ones(1, 1, dtype=torch.float64, requires_grad=True), weight.double())
    expected = value_and_gradients(
        loss(wide, TopKLogits(kept.ids, kept.logits.double(), kept.rest.double())), wide
    )
    value, (gradient,) = value_and_gradients(loss(student, kept), student, torch.tensor(0.7))
    assert_close(value.double(), expected[0], rtol=1e-6, atol=0)
    assert_close(gradient.double(), expected[1][0], rtol=1e-5, atol=0)


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
def test_classes_that_neither_network_has(loss, dtype):
    """Excluded by a bias of -inf, all of the rest among them."""
    student, target = head(ROWS, dtype=dtype), labels(ROWS, classes=4)
    with torch.no_grad():
        student.bias[4:] = -math.inf
    logits = normal(ROWS, CLASSES, seed=6, dtype=dtype)
    logits[:, 4:] = -math.inf
    fewer = LinearLogits(student.hidden, student.weight, student.bias, vocab_size=4)
    expected = value_and_gradients(loss(fewer, logits[:, :4], target), student)
    for teacher in (logits, TopKLogits.of(logits, 4), TopKLogits.of(logits, 6)):
        found = value_and_gradients(loss(student, teacher, target), student)
        assert_close(found, expected)


# Laws


@each
def test_a_constant_added_to_the_teacher_changes_nothing(loss):
    student, logits, target = head(ROWS), normal(ROWS, CLASSES, seed=6), labels(ROWS)
    shift = 5 * normal(ROWS, 1, seed=7)
    found, expected = (
        value_and_gradients(loss(student, t, target), student) for t in (logits + shift, logits)
    )
    assert_close(found, expected, rtol=1e-10, atol=1e-12)


@each
def test_padding_has_no_probability_whatever_is_in_it(loss):
    student, teacher, target = head(ROWS, bias=False), normal(ROWS, CLASSES, seed=6), labels(ROWS)
    expected = value_and_gradients(loss(student, teacher, target), student)
    padding = torch.full((5, WIDTH), math.nan, dtype=torch.float64)
    padded = LinearLogits(
        student.hidden, torch.cat([student.weight.detach(), padding]).requires_grad_(), vocab_size=CLASSES
    )
    value, (of_hidden, of_weight) = value_and_gradients(loss(padded, teacher, target), padded)
    assert_close((value, (of_hidden, of_weight[:CLASSES])), expected, rtol=0, atol=0)
    assert (of_weight[CLASSES:] == 0).all()
    exact = LinearLogits(normal(ROWS, 4, seed=8), normal(CLASSES + 3, 4, seed=9), vocab_size=CLASSES)
    assert_close(loss(student, exact, target), unfused(loss, student, exact, target))


@each
def test_chunks_of_a_batch_are_the_batch(loss):
    """Summed over micro-batches; the mean divides by the rows that count in each."""
    student, teacher, target = head(ROWS), normal(ROWS, CLASSES, seed=6), labels(ROWS)
    whole = loss(student, teacher, target, reduction="sum")
    parts = [
        loss(
            LinearLogits(student.hidden[i], student.weight, student.bias),
            teacher[i],
            target[i],
            reduction="sum",
        )
        for i in (slice(0, 3), slice(3, ROWS))
    ]
    assert_close(sum(parts), whole)


# Modules and errors


@each_option
def test_a_module_is_its_function(loss, options):
    student, teacher, target = head(ROWS), head(ROWS, seed=4), labels(ROWS)
    target[2] = -7
    weight = torch.rand(ROWS, dtype=torch.float64)
    shared = {"ignore_index": -7, "reduction": "sum", "chunk_rows": 3, **options}
    module = MODULES[loss](**shared)
    expected = loss(student, teacher, target, row_weight=weight, **shared)
    for twin in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert_close(twin(student, teacher, target, weight), expected, rtol=0, atol=0)
    assert not module.state_dict()
    text = ", ".join(f"{name}={getattr(module, name)!r}" for name in module.options() if name in shared)
    assert repr(module) == f"{type(module).__name__}({text})"


@each
@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("chunk_rows", 0),
        ("chunk_rows", 2.0),
        ("reduction", "average"),
        ("backend", "fast"),
        ("temperature", 0.0),
        ("top_k", 0),
        ("epsilon", 1.0),
        ("tolerance", -1.0),
        ("ties", "first"),
    ],
)
def test_a_bad_option_is_refused_by_function_and_module_alike(loss, option, value):
    if loss is luce.linear_pld_loss and option == "temperature":
        option = "teacher_temperature"
    module = MODULES[loss]
    if option not in module().options():
        assert loss is luce.linear_kd_loss
        return
    with pytest.raises(ValueError, match=f"`{option}`") as from_function:
        loss(head(2), head(2), labels(2), **{option: value})
    with pytest.raises(ValueError, match=f"`{option}`") as from_module:
        module(**{option: value})
    assert str(from_module.value) == str(from_function.value)


@each
@pytest.mark.parametrize(
    ("teacher", "error", "words"),
    [
        (normal(ROWS, CLASSES + 1), ValueError, rf"the {CLASSES} classes of `student`, got {CLASSES + 1}"),
        (head(ROWS, classes=CLASSES + 1), ValueError, "`vocab_size` excludes padding"),
        (
            normal(ROWS + 1, CLASSES),
            ValueError,
            rf"rows of shape \({ROWS},\) like `student`, got \({ROWS + 1},\)",
        ),
        (TopKLogits.of(normal(ROWS + 1, CLASSES), 2), ValueError, "rows of shape"),
        (
            TopKLogits.of(normal(ROWS, 30), 20),
            ValueError,
            f"at most the {CLASSES} classes of `student`, got 20",
        ),
        (TopKLogits.of(normal(ROWS, CLASSES), 2, temperature=3.0), ValueError, "to be the 3.0 at which"),
        (TopKLogits(torch.full((ROWS, 1), CLASSES), normal(ROWS, 1), normal(ROWS)), ValueError, "`ids` in"),
        (TopKLogits(torch.zeros(ROWS, 2).long(), normal(ROWS, 2), normal(ROWS)), ValueError, "got one twice"),
        (normal(ROWS, CLASSES, dtype=torch.float64).long(), TypeError, "`teacher` of a floating dtype"),
        ([1.0], TypeError, "`teacher` to be LinearLogits, TopKLogits or a torch.Tensor of logits, got list"),
        (
            head(ROWS, dtype=torch.float32).__class__(normal(ROWS, 3), normal(CLASSES, 3).float()),
            TypeError,
            "teacher.weight",
        ),
        (normal(ROWS, CLASSES).to("meta"), ValueError, "`teacher` on cpu like `student`, got meta"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_teachers_that_do_not_fit(loss, teacher, error, words):
    with pytest.raises(error, match=words):
        loss(head(ROWS), teacher, labels(ROWS))


@each
def test_students_that_do_not_fit(loss):
    with pytest.raises(TypeError, match="`student` to be LinearLogits, got Tensor"):
        loss(normal(ROWS, CLASSES), normal(ROWS, CLASSES))
    mixed = LinearLogits(normal(ROWS, WIDTH, dtype=torch.bfloat16), normal(CLASSES, WIDTH))
    with pytest.raises(
        TypeError, match=r"`student.weight` of torch.bfloat16 like `student.hidden`, got torch.float64"
    ):
        loss(mixed, normal(ROWS, CLASSES))
    with teacher_gradient(), pytest.raises(ValueError, match="treats the teacher as constant"):
        loss(head(ROWS), normal(ROWS, CLASSES))


def test_labels_of_no_class():
    student, logits = head(ROWS), normal(ROWS, CLASSES)
    target = labels(ROWS)
    for wrong in (CLASSES, -2):
        target[2] = wrong
        for teacher in (logits, TopKLogits.of(logits, 3)):
            with pytest.raises(ValueError, match=rf"labels in \[0, {CLASSES}\) .* got {wrong}"):
                luce.linear_pld_loss(student, teacher, target)
    luce.linear_kd_loss(student, logits, target)
    with pytest.raises(ValueError, match=rf"`target` of shape \({ROWS},\)"):
        luce.linear_kd_loss(student, logits, labels(ROWS + 1))


def test_top_k_has_no_top_k():
    kept = TopKLogits.of(normal(ROWS, CLASSES), 3)
    for option in ({"top_k": 2}, {"epsilon": 0.1}, {"ties": "average"}):
        with pytest.raises(ValueError, match="with TopKLogits: the kept classes are the places"):
            luce.linear_pld_loss(head(ROWS), kept, **option)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"hidden": normal(2, 4)}, ValueError, r"`hidden` of shape \(..., 3\)"),
        ({"hidden": 1.0}, TypeError, "`hidden` to be a torch.Tensor, got float"),
        ({"hidden": torch.ones(2, 3).long()}, TypeError, "`hidden` of a floating dtype"),
        ({"weight": normal(3)}, ValueError, r"`weight` of shape \(V, H\)"),
        ({"weight": normal(0, 3)}, ValueError, "not empty"),
        ({"weight": normal(5, 3).to("meta")}, ValueError, "`weight` on cpu like `hidden`, got meta"),
        ({"bias": normal(4)}, ValueError, r"`bias` of shape \(5,\)"),
        ({"scale": 0.0}, ValueError, "`scale`"),
        ({"softcap": -1.0}, ValueError, "`softcap`"),
        ({"softcap": math.inf}, ValueError, "`softcap`"),
        ({"vocab_size": 6}, ValueError, "`vocab_size` between 1 and the 5 rows"),
        ({"vocab_size": 0}, ValueError, "`vocab_size`"),
    ],
)
def test_heads_that_do_not_fit(arguments, error, words):
    with pytest.raises(error, match=words):
        LinearLogits(**{"hidden": normal(2, 3), "weight": normal(5, 3), **arguments})


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"ids": normal(2, 3)}, TypeError, "`ids` of an integer dtype"),
        ({"ids": torch.zeros(2, 0).long()}, ValueError, "K at least 1"),
        ({"logits": normal(2, 4)}, ValueError, r"`logits` of shape \(2, 3\) like `ids`"),
        ({"rest": normal(3)}, ValueError, r"`rest` of shape \(2,\)"),
        ({"temperature": 0.0}, ValueError, "`temperature`"),
    ],
)
def test_what_was_kept_must_fit_together(arguments, error, words):
    with pytest.raises(error, match=words):
        TopKLogits(
            **{"ids": torch.arange(3).expand(2, 3), "logits": normal(2, 3), "rest": normal(2), **arguments}
        )
    with pytest.raises(ValueError, match="`k` between 1 and the 3 classes, got 4"):
        TopKLogits.of(normal(2, 3), 4)
