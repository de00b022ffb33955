"""Two views of a batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.data import TensorDataset

from luce import CrossEntropyLoss, KDLoss, MLLDLoss, PartialKDLoss, WeightedSum
from luce.data import Examples
from luce.errors import UserError
from luce.methods import (
    CoTrains,
    LogitMethod,
    LooksAhead,
    OptimizesManually,
    StepsAfter,
    TrainingRows,
    TwoViewMethod,
    strong_view,
)
from luce.methods.base import Batch
from luce.signals import DenseSignal, LiveTeacher, Teacher
from luce.training.batches import TrainingBatches

EXAMPLES = Examples(TensorDataset(torch.zeros(3, 2), torch.zeros(3).long()), range(3))
SUM = WeightedSum({"task": (0.5, CrossEntropyLoss()), "mlld": (2.0, MLLDLoss())})


def batch() -> dict[str, Tensor]:
    views = {"input": torch.randn(6, 3), "strong": torch.randn(6, 3)}
    return {**views, "target": torch.arange(6) % 4, "index": torch.arange(6)}


def test_the_strong_view_of_a_batch_is_a_batch_of_one_view() -> None:
    rows = batch()
    view = strong_view(rows)
    assert view.keys() == {"input", "target", "index"}
    assert view["input"] is rows["strong"]
    assert "strong" in rows


def test_a_step_is_the_sum_of_a_step_for_each_view() -> None:
    student, rows = nn.Linear(3, 4), batch()
    first, second = DenseSignal(torch.randn(6, 4)), DenseSignal(torch.randn(6, 4))
    signal = DenseSignal(first.logits, strong=second)
    terms = TwoViewMethod(LogitMethod(SUM), weight=3.0, strong_weight=0.25).step(student, rows, signal)
    weak = SUM(student(rows["input"]), first.logits, rows["target"])
    strong = SUM(student(rows["strong"]), second.logits, rows["target"])
    assert terms.keys() == {"task", "mlld", "strong.task", "strong.mlld", "loss"}
    for name in ("task", "mlld"):
        assert_close(terms[name], 3 * weak[name])
        assert_close(terms[f"strong.{name}"], 0.25 * strong[name])
    assert_close(terms["loss"], 3 * weak["loss"] + 0.25 * strong["loss"])
    assert_close(sum(value for name, value in terms.items() if name != "loss"), terms["loss"])


def test_two_views_without_a_teacher_and_a_loss_of_one_s_own() -> None:
    def loss(student_logits: Tensor, teacher_logits: Tensor | None, target: Tensor) -> Tensor:
        assert teacher_logits is None
        return student_logits.square().mean()

    student, rows = nn.Linear(3, 4), batch()
    terms = TwoViewMethod(LogitMethod(loss)).step(student, rows, None)
    assert terms.keys() == {"loss"}
    expected = student(rows["input"]).square().mean() + student(rows["strong"]).square().mean()
    assert_close(terms["loss"], expected)


@pytest.mark.parametrize(
    "loss",
    [CrossEntropyLoss(), KDLoss(), PartialKDLoss(keep="class_mean"), SUM],
    ids=["CE", "KD", "partial", "sum"],
)
def test_two_views_need_what_one_needs(loss: nn.Module) -> None:
    one = LogitMethod(loss)
    two = TwoViewMethod(one)
    for name in ("needs_teacher", "uses_unlabelled", "capabilities"):
        assert getattr(two, name) == getattr(one, name)
    assert one.capabilities.prepares is (one if one.needs_preparation else None)
    assert (one.two_views, two.two_views) == (False, True)


def test_two_views_prepare_and_hear_of_epochs_once() -> None:
    heard: list[object] = []

    class Spy(LogitMethod):
        def prepare(self, teacher: Teacher, rows: TrainingRows) -> dict[str, float]:
            heard.append((teacher, rows))
            return {"found": 1.0}

        def set_epoch(self, epoch: int) -> None:
            heard.append(epoch)

    spy = Spy(nn.Linear(2, 2))
    spy.needs_preparation = True
    method = TwoViewMethod(spy)
    teacher, rows = LiveTeacher(nn.Linear(2, 2)), TrainingBatches(EXAMPLES, torch.device("cpu"))
    prepares = method.capabilities.prepares
    assert prepares is spy
    assert prepares.prepare(teacher, rows) == {"found": 1.0}
    method.set_epoch(5)
    assert heard == [(teacher, rows), 5]
    assert len(list(method.parameters())) == 2


def test_two_views_leave_nothing_out_that_goes_on_between_steps() -> None:
    class Watching(LooksAhead, StepsAfter, CoTrains, LogitMethod):
        batches_per_round, held_out, held_out_batches = 3, 0.25, 2

        @property
        def co_trained(self) -> Mapping[str, nn.Module]:
            return {"loss": self}

        def before_round(self, *arguments: Any) -> dict[str, Tensor]:
            return {"before": torch.tensor(arguments[-1])}

        def after_step(self, student: nn.Module, batch: Batch) -> dict[str, Tensor]:
            return {"after": batch["target"].sum()}

    one, student, rows = Watching(KDLoss()), nn.Linear(3, 4), batch()
    two = TwoViewMethod(one)
    found = two.capabilities
    assert found.looks_ahead is found.steps_after is found.co_trains is one
    assert found.optimizes_manually is found.generates_inputs is found.prepares is None
    assert found.co_trains.co_trained == {"loss": one}
    assert found.looks_ahead.before_round(student, [rows], [], 0.5) == {"before": 0.5}
    assert found.steps_after.after_step(student, rows) == {"after": rows["target"].sum()}


def test_a_method_with_steps_of_its_own_looks_at_one_view() -> None:
    class Manual(OptimizesManually, LogitMethod):
        optimizers: Mapping[str, Any] = {}

    with pytest.raises(UserError, match="one view of each batch for Manual"):
        TwoViewMethod(Manual(KDLoss()))


@pytest.mark.parametrize("weights", [{"weight": 0.0}, {"strong_weight": -1.0}, {"weight": float("inf")}])
def test_weights_that_make_no_sense(weights: dict[str, float]) -> None:
    (name,) = weights
    with pytest.raises(ValueError, match=f"`{name}` to be a finite number above 0"):
        TwoViewMethod(LogitMethod(KDLoss()), **weights)
