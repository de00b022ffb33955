"""Integer options at their extremes, rankings that are none, and labels of the error bound."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

import luce
from luce.losses import spectral_norm
from luce.losses.functional.embeddings import cc_loss
from luce.ops import engines

from . import feature_cases
from .catalogue import LOSSES, Case, Loss, batch

EXTREMES = (0, -1, -(2**63), 2**63 - 1, 2**31, 2**63, 10**30)
OTHERS = {"top_k": {"keep": "topk"}}
"""Options without which another one is not read."""


def outcome(call: Callable[..., Any], *arguments: Any, **options: Any) -> tuple[str, Any]:
    """The message of a refusal, or the result."""
    try:
        return "", call(*arguments, **options)
    except (ValueError, TypeError) as error:
        return str(error), None


@pytest.mark.parametrize("described", LOSSES, ids=lambda loss: loss.name)
def test_options_of_losses(described: Loss) -> None:
    """Each is finite or refused in words of ours; before, some hung, overflowed or asked for 40 GB."""
    student, teacher, target = batch(3)
    for name, parameter in inspect.signature(described.function).parameters.items():
        kind = str(parameter.annotation)
        if parameter.kind is not parameter.KEYWORD_ONLY or ("int" not in kind and "float" not in kind):
            continue
        more = OTHERS.get(name, {}) if described.function is luce.partial_kd_loss else {}
        for value in EXTREMES:
            message, result = outcome(Case(described), student, teacher, target, **{**more, name: value})
            assert message.startswith("expected") or result.isfinite(), (name, value, message)


@pytest.mark.parametrize("known", feature_cases.CASES, ids=str)
def test_options_of_losses_on_features(known: feature_cases.Case) -> None:
    for field in inspect.signature(known.module).parameters.values():
        if "int" not in str(field.annotation):
            continue
        for value in EXTREMES:
            message, module = outcome(known.module, **{**known.options, field.name: value})
            assert message.startswith("expected") or getattr(module, field.name) == value


@pytest.mark.parametrize("algorithm", ["power", "lanczos"])
def test_iterations_have_an_end(algorithm: Any) -> None:
    with pytest.raises(ValueError, match="`iterations` to be an integer of at least 1 and at most 10000"):
        spectral_norm(torch.eye(2), iterations=2**63 - 1, algorithm=algorithm)


@pytest.mark.skipif(engines.WHY_NOT is not None, reason=f"no native library: {engines.WHY_NOT}")
def test_the_native_operator_refuses_places_below_one() -> None:
    logits = torch.randn(2, 5)
    for top_k in (0, -1, -(2**63)):
        with pytest.raises(RuntimeError, match="expected `top_k` of at least 1"):
            torch.ops.luce.pld(logits, logits, None, None, None, 1.0, top_k, 0.0, 0.0, False, False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_logits_whose_difference_has_no_digit_for_the_student(backend: Any, dtype: torch.dtype) -> None:
    """Reverse KL is the sum of q (log q - log p), and log p is t - max t beside logits of 1e17."""
    student, teacher = torch.zeros(33, dtype=dtype), (1e17 * torch.linspace(-3, 3, 33)).to(dtype)
    student[5] = 30
    log_q, log_p = student.double().log_softmax(0), teacher.double() - teacher.double().max()
    expected = (log_q.exp() * (log_q - log_p)).sum().item()
    logits = student[None].requires_grad_()
    value = luce.reverse_kl_loss(logits, teacher[None], backend=backend)
    assert value.item() == pytest.approx(expected, rel=1e-6)
    (gradient,) = torch.autograd.grad(value, logits)
    assert gradient.isfinite().all()


def test_the_correlation_kernel_of_a_narrow_gaussian() -> None:
    """Its value is exp(-2g) sum (2g cos)^p / p!: with cosines 0 and 1 and P = 1, (1 + 2g) exp(-2g)."""
    student, teacher = torch.eye(2, dtype=torch.float64), torch.ones(2, 2, dtype=torch.float64)
    for gamma in (0.5, 5.0, 50.0, 500.0):
        expected = 2 * (2 * gamma * math.exp(-2 * gamma)) ** 2 / 4  # the two pairs of different rows
        assert cc_loss(student, teacher, gamma=gamma, order=1).item() == pytest.approx(
            expected, rel=1e-9, abs=1e-300
        )
    assert cc_loss(student, teacher, gamma=1e18, order=100) == 0


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("options", [{}, {"top_k": 2}, {"ties": "average"}], ids=str)
def test_a_teacher_order_that_is_no_ranking(backend: Any, options: dict[str, Any]) -> None:
    student, teacher, target = batch(3)
    order = luce.teacher_order(teacher)
    known = {"backend": backend, **options}
    expected = luce.pld_loss(student, teacher, target, **known)
    assert luce.pld_loss(student, teacher, target, teacher_order=order, **known) == expected
    doubled, beyond = order.clone(), order.clone()
    doubled[1, 0], beyond[2, 3] = order[1, 1], 5
    for wrong in (doubled, beyond, order - 1, order * 0, torch.full_like(order, 2**40)):
        with pytest.raises(ValueError, match="`teacher_order` to hold every class once"):
            luce.pld_loss(student, teacher, target, teacher_order=wrong, **known)
    target[1] = -100  # a row that does not count may hold anything
    expected = luce.pld_loss(student, teacher, target, **known)
    assert luce.pld_loss(student, teacher, target, teacher_order=doubled, **known) == expected


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_labels_of_the_error_bound(backend: Any) -> None:
    student, teacher, target = batch(3)
    for wrong in (5, -2, 2**40):
        target[0] = wrong
        with pytest.raises(ValueError, match=f"expected labels in .* got {wrong}"):
            luce.pld_error_bound(student, teacher, target, top_k=2, backend=backend)
    target[0] = -100
    assert luce.pld_error_bound(student, teacher, target, top_k=2, backend=backend)[0][0] == 0
    target[0] = -1
    assert luce.pld_error_bound(student, teacher, target, top_k=2, backend=backend)[0][0] > 0
