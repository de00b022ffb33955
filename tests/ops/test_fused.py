"""Fused operators: their declarations, and derivatives by `torch.func` and in batches."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from luce.ops import engines
from luce.ops.kd import forward_kl
from luce.ops.kd.reference import KINDS
from luce.ops.pld import PldOptions
from luce.ops.rkkd import FORMS
from luce.ops.softmax import ALGORITHMS

CSRC = Path(__file__).parents[2] / "csrc"

pytestmark = pytest.mark.skipif(engines.WHY_NOT is not None, reason=f"no native library: {engines.WHY_NOT}")


def test_schemas_are_derived_from_the_references():
    rows = "(Tensor values, Tensor gradient)"
    logits = "Tensor student, Tensor teacher"
    options = "float teacher_temperature, int top_k, float epsilon, float tolerance, bool average_ties"
    for op, arguments, results in (
        ("cross_entropy", "Tensor student, Tensor target, Tensor? weight, float label_smoothing", rows),
        ("divergence", f"{logits}, Tensor? weight, int kind, float temperature, float beta", rows),
        ("dkd", f"{logits}, Tensor target, Tensor? weight, float temperature, float alpha, float beta", rows),
        ("rkkd", f"{logits}, Tensor? weight, int form, float steepness", rows),
        (
            "pld",
            f"{logits}, Tensor? target, Tensor? weight, Tensor? order, {options}",
            "(Tensor values, Tensor bound, Tensor gradient)",
        ),
    ):
        schema = str(getattr(torch.ops.luce, op).default._schema)
        assert schema == f"luce::{op}({arguments}, bool needs_gradient) -> {results}"


@pytest.mark.parametrize(
    ("header", "pattern", "names"),
    [
        ("pld.h", r"struct PldOptions \{(.*?)\}", PldOptions._fields),
        ("divergence.h", r"enum class Divergence : int64_t \{(.*?)\}", KINDS),
        ("rkkd.h", r"enum class RkkdForm : int64_t \{(.*?)\}", FORMS[:4]),
        ("softmax.h", r"enum class SoftmaxAlgorithm : int64_t \{(.*?),\s*count", ALGORITHMS),
    ],
)
def test_kernels_number_their_options_as_python_does(header, pattern, names):
    """By position: nothing else would notice an exchange of two of them."""
    (body,) = re.findall(pattern, (CSRC / header).read_text(encoding="utf-8"), re.DOTALL)
    listed = re.findall(r"(\w+)\s*(?:[,;]|$)", body.strip())
    assert [name.replace("automatic", "auto") for name in listed] == list(names)


@pytest.fixture
def pair():
    """An operator in the native library and in plain PyTorch, as functions of the student alone."""
    student, teacher = torch.randn(2, 3, 5)
    return student, [lambda s, b=b: forward_kl(s, teacher, 2.0, backend=b) for b in ("cpu", "reference")]


def both(pair, result):
    student, ops = pair
    native, plain = (result(op, student.clone().requires_grad_()) for op in ops)
    assert_close(native, plain)


def test_gradients_in_batches(pair):
    directions = torch.randn(4, 3)
    both(pair, lambda op, s: torch.autograd.grad(op(s), s, directions, is_grads_batched=True)[0])
    both(pair, lambda op, s: torch.autograd.functional.jacobian(op, s, vectorize=True))


def test_torch_func(pair):
    upstream = torch.tensor([1.0, -2.0, 0.5])
    both(pair, lambda op, s: torch.func.grad(lambda x: op(x).sum())(s.detach()))
    both(pair, lambda op, s: torch.func.vjp(op, s.detach())[1](upstream)[0])
    both(pair, lambda op, s: torch.func.jacrev(op)(s.detach()))
    both(pair, lambda op, s: torch.func.jacrev(torch.func.grad(lambda x: op(x).sum()))(s.detach()))


def test_what_torch_func_returns_can_be_differentiated(pair):
    upstream = torch.tensor([1.0, -2.0, 0.5], requires_grad=True)

    def by_student(op, s):
        (torch.func.jacrev(op)(s) ** 2).sum().backward()
        (torch.func.vjp(op, s)[1](upstream)[0] ** 2).sum().backward()
        return s.grad

    def by_upstream(op, s):
        product = torch.func.vjp(op, s.detach())[1](upstream)[0]
        return torch.autograd.grad(product.square().sum(), upstream)[0]

    both(pair, by_student)
    both(pair, by_upstream)


def test_a_gradient_may_be_changed_though_the_graph_is_kept(pair):
    student, (native, _) = pair
    student.requires_grad_()
    value = native(student).sum()
    (first,) = torch.autograd.grad(value, student, retain_graph=True)
    expected = first.clone()
    first.zero_()
    assert_close(torch.autograd.grad(value, student)[0], expected, rtol=0, atol=0)


def test_what_watches_operators_sees_the_product(pair):
    """A graph that is traced from numbers must hold for others."""
    from torch.fx.experimental.proxy_tensor import make_fx

    student, (native, plain) = pair

    def gradient(s, factor):
        s = s.detach().requires_grad_()
        return torch.autograd.grad((factor * native(s)).sum(), s)[0]

    traced = make_fx(gradient)(student, torch.ones(()))
    s = student.clone().requires_grad_()
    expected = torch.autograd.grad((3 * plain(s)).sum(), s)[0]
    assert_close(traced(student, torch.tensor(3.0)), expected)
