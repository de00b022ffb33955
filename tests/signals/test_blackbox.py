"""What black boxes tell, and the logits that stand for it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import luce
from luce.errors import UserError
from luce.methods import FeatureMethod, MetaDistil
from luce.signals import BudgetError, CachedTeacher, LocalBlackBox, answer, logits_from
from luce.signals.blackbox import GAP

LOGITS = torch.tensor([[2.0, -0.5, 0.5, 1.0]], dtype=torch.float64)
KINDS: list[dict[str, Any]] = [{"answers": "probs"}, {"answers": "topk", "top_k": 2}, {"answers": "label"}]


def box(**options: Any) -> LocalBlackBox:
    return LocalBlackBox(nn.Identity(), classes=4, **options)


def rows(count: int, classes: int = 4) -> dict[str, Tensor]:
    return {"input": torch.randn(count, classes), "index": torch.arange(count)}


def test_probabilities_give_the_centred_logits() -> None:
    found = logits_from(answer(LOGITS, "probs"), "probs", 4)
    assert found.tolist()[0] == pytest.approx([1.25, -1.25, -0.25, 0.25], abs=1e-12)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-12, 12), min_size=2, max_size=9), st.integers(1, 9))
def test_what_was_told_is_in_the_logits(values: list[float], top_k: int) -> None:
    logits = torch.tensor([values], dtype=torch.float64)
    classes, top_k = len(values), min(top_k, len(values))
    torch.testing.assert_close(
        logits_from(answer(logits, "probs"), "probs", classes), logits - logits.mean(), rtol=0, atol=1e-9
    )
    found = logits_from(answer(logits, "topk", top_k), "topk", classes).softmax(-1)
    best = logits.softmax(-1).topk(top_k)
    torch.testing.assert_close(found.gather(1, best.indices), best.values, rtol=1e-6, atol=1e-9)
    others = found.scatter(1, best.indices, 0.0)
    assert others.max() <= best.values.min() * (1 + 1e-9)
    left = [value for index, value in enumerate(found[0].tolist()) if index not in best.indices[0]]
    assert max(left, default=0) == pytest.approx(min(left, default=0))
    label = logits_from(answer(logits, "label"), "label", classes)
    assert label.argmax() == logits.argmax()


def test_top_k_by_hand() -> None:
    told = torch.tensor([[2.0, 0.0, 0.6, 0.2]])
    found = logits_from(told, "topk", 5)[0]
    rest = 0.2 / 3
    logs = [math.log(p) for p in (0.2, rest, 0.6, rest, rest)]
    assert found.tolist() == pytest.approx([value - sum(logs) / 5 for value in logs], rel=1e-5)


def test_rounded_probabilities_of_top_k_put_no_other_class_before_them() -> None:
    found = logits_from(torch.tensor([[1.0, 3.0, 0.3, 0.1]]), "topk", 4)[0]  # 0.6 are left for two classes
    assert found.tolist()[1] == found.max().item()
    assert found.tolist()[3] == pytest.approx(found.tolist()[0])


def test_a_floor_keeps_what_was_rounded_to_0_finite() -> None:
    told = torch.tensor([[1.0, 0.0, 0.0, 0.0]])
    for floor in (1e-12, 5e-4):
        found = logits_from(told, "probs", 4, floor=floor)[0]
        assert (found[0] - found[1]).item() == pytest.approx(-math.log(floor), rel=1e-5)


def test_a_floor_of_rounding_makes_no_sure_teacher_of_many_classes_unsure() -> None:
    """What is left is for all the other classes together."""
    for told, best in (([7.0, 0.999], 0.999), ([7.0, 1.0], 0.9995), ([7.0, 3.0, 1.0, 0.0], 0.999)):
        found = logits_from(torch.tensor([told]), "topk", 214, floor=5e-4).softmax(-1)[0]
        assert found.max().item() == pytest.approx(best, abs=2e-5)
        assert found[7] == found.max()


@pytest.mark.parametrize("temperature", [1.0, 4.0, 10.0])
def test_kd_from_a_label_is_cross_entropy_with_it(temperature: float) -> None:
    student = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(6, 4, dtype=torch.float64)
    told = logits_from(answer(teacher, "label"), "label", 4)
    loss = luce.kd_loss(student, told, temperature=temperature)
    expected = temperature**2 * nn.functional.cross_entropy(student / temperature, teacher.argmax(-1))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    (gradient,) = torch.autograd.grad(loss, student)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, student)[0])


def test_the_gap_of_a_label() -> None:
    found = logits_from(torch.tensor([[2.0]]), "label", 4)[0]
    assert found.tolist() == pytest.approx([-GAP / 4, -GAP / 4, GAP * 3 / 4, -GAP / 4])


@pytest.mark.parametrize("loss", [luce.pld_loss, luce.dist_loss, luce.kd_loss, luce.listnet_loss])
@pytest.mark.parametrize("options", KINDS, ids=lambda options: options["answers"])
def test_losses_take_them(loss: Any, options: dict[str, Any]) -> None:
    student = torch.randn(6, 4, requires_grad=True)
    answers = box(**options).signal(rows(6))
    value = loss(student, answers.logits, torch.arange(6) % 4)
    assert torch.isfinite(value)
    assert torch.isfinite(torch.autograd.grad(value, student)[0]).all()


def test_pld_of_the_best_classes_sees_what_was_told_alone() -> None:
    """As long as the label, whose probability PLD weighs by, is among them."""
    student, teacher = torch.randn(8, 4), torch.randn(8, 4)
    target = teacher.topk(2).indices[:, 1]
    told = box(answers="topk", top_k=2).signal({"input": teacher}).logits
    seen = luce.pld_loss(student, told, target, top_k=2)
    assert seen.item() == pytest.approx(luce.pld_loss(student, teacher, target, top_k=2).item(), rel=1e-5)


# Local black boxes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", KINDS, ids=lambda options: options["answers"])
def test_a_signal_says_what_was_told(options: dict[str, Any]) -> None:
    teacher = box(**options)
    signal = teacher.signal(rows(6))
    assert signal.kind == options["answers"]
    assert signal.logits.shape == (6, 4)
    assert not signal.logits.requires_grad
    assert CachedTeacher.of(teacher, [rows(3)], rows=3).signal(rows(3)).kind == options["answers"]


def test_a_budget_is_looked_at_before_anything_is_asked() -> None:
    teacher = box(answers="label", budget=10)
    for _ in range(2):
        teacher.signal(rows(4))
    calls: list[int] = []
    teacher.model.register_forward_hook(lambda *_: calls.append(1))
    with pytest.raises(BudgetError, match=r"expected at most 10 rows .* got 3 more after 8"):
        teacher.signal(rows(3))
    assert (teacher.queries, calls) == (8, [])
    teacher.signal(rows(2))
    assert teacher.queries == 10
    other = teacher.account("another run")
    other.signal(rows(10))
    assert (other.queries, teacher.queries) == (10, 10)
    assert other.cost == {"answers": "label", "top_k": None, "queries": 10, "budget": 10}


def test_a_network_in_16_bits_is_softened_in_32() -> None:
    logits = torch.randn(5, 4).bfloat16()
    assert torch.equal(box(answers="probs").query(logits), logits.float().softmax(-1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"answers": "logits"}, "unknown kind of `answers` `logits`"),
        ({"answers": "labels"}, "did you mean `label`"),
        ({"answers": "topk"}, r"expected `top_k` in 1 \.\. 4"),
        ({"answers": "topk", "top_k": 5}, r"expected `top_k` in 1 \.\. 4"),
        ({"answers": "topk", "top_k": True}, r"expected `top_k` in 1 \.\. 4"),
        ({"answers": "probs", "top_k": 2}, "expected `top_k` only with `answers: topk`"),
        ({"answers": "probs", "budget": -1}, "expected a `budget` of at least 0"),
    ],
)
def test_what_a_black_box_may_not_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        box(**options)


def test_nobody_looks_inside() -> None:
    student = nn.Sequential(nn.Linear(4, 4))
    method = FeatureMethod(None, {"hint": (1.0, luce.FitNetLoss(), ["0"], ["0"])})
    with pytest.raises(UserError, match="got a black box that answers with label only"):
        method.build(student, box(answers="label"), rows(2), rows(2))
    learning = MetaDistil(luce.methods.LogitMethod(luce.KDLoss()), quiz=0.1)
    with pytest.raises(UserError, match="got a black box"):
        learning.build(student, box(answers="label"), rows(2), rows(2))
