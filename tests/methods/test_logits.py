"""Distillation through the logits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from luce import CrossEntropyLoss, DKDLoss, FitNetLoss, KDLoss, PLDLoss, WeightedSum
from luce.errors import UserError
from luce.methods import LogitMethod, Method
from luce.signals import DenseSignal

CE_AND_KD = WeightedSum({"task": (0.5, CrossEntropyLoss()), "kd": (2.0, KDLoss(temperature=3.0))})


def batch() -> dict[str, Tensor]:
    return {"input": torch.randn(6, 3), "target": torch.arange(6) % 4, "index": torch.arange(6)}


@pytest.mark.parametrize(
    ("loss", "needs_teacher", "uses_unlabelled"),
    [
        (PLDLoss(), True, True),
        (KDLoss(), True, True),
        (DKDLoss(), True, False),
        (CrossEntropyLoss(), False, False),
        (CE_AND_KD, True, True),
        (WeightedSum({"task": (1.0, CrossEntropyLoss())}), False, False),
        (WeightedSum({"task": (1.0, CrossEntropyLoss()), "mine": (1.0, nn.MSELoss())}), True, True),
        (nn.MSELoss(), True, True),
        (lambda student, teacher, target: student.sum(), True, True),
    ],
    ids=["PLD", "KD", "DKD", "CE", "CE + KD", "sum of CE", "CE + unknown", "unknown", "function"],
)
def test_a_method_asks_for_what_its_loss_needs(loss, needs_teacher: bool, uses_unlabelled: bool) -> None:
    method = LogitMethod(loss)
    assert (method.needs_teacher, method.uses_unlabelled) == (needs_teacher, uses_unlabelled)


def test_a_loss_on_features_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"got FitNetLoss, which compares features; pass it to a luce\.methods"
    ):
        LogitMethod(FitNetLoss())


def test_a_loss_can_be_called() -> None:
    with pytest.raises(UserError, match=r"expected a loss such as luce\.KDLoss\(\), .* got 'KDLoss'"):
        LogitMethod("KDLoss")  # type: ignore[arg-type]


def test_a_step_is_one_forward_pass_and_the_loss() -> None:
    student, rows, teacher_logits = nn.Linear(3, 4), batch(), torch.randn(6, 4)
    terms = LogitMethod(CE_AND_KD).step(student, rows, DenseSignal(teacher_logits))
    logits = student(rows["input"])
    task = nn.functional.cross_entropy(logits, rows["target"])
    kd = 9 * nn.functional.kl_div(
        (logits / 3).log_softmax(-1), (teacher_logits / 3).softmax(-1), reduction="batchmean"
    )
    assert terms.keys() == {"task", "kd", "loss"}
    torch.testing.assert_close(terms["task"], task / 2)
    torch.testing.assert_close(terms["kd"], 2 * kd)
    torch.testing.assert_close(terms["loss"], task / 2 + 2 * kd)
    terms["loss"].backward()
    assert student.weight.grad.abs().sum() > 0


def test_a_loss_of_one_s_own_may_return_a_scalar() -> None:
    seen = []

    def loss(student_logits: Tensor, teacher_logits: Tensor | None, target: Tensor) -> Tensor:
        seen.append((teacher_logits, target))
        return student_logits.square().mean()

    rows = batch()
    terms = LogitMethod(loss).step(nn.Linear(3, 4), rows, None)
    assert terms.keys() == {"loss"}
    assert seen[0][0] is None
    assert seen[0][1] is rows["target"]


def test_the_parameters_of_a_method_are_those_of_its_loss() -> None:
    class Projected(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.projector = nn.Linear(4, 2)

    assert len(list(LogitMethod(Projected()).parameters())) == 2
    assert not list(LogitMethod(CE_AND_KD).parameters())


def test_a_method_without_a_step_is_none() -> None:
    with pytest.raises(TypeError, match="abstract"):
        Method()  # type: ignore[abstract]
