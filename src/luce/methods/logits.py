"""Distillation through the logits: any loss of `luce.losses`, or one of your own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeAlias

import torch
from torch import Tensor, nn

from ..losses import FeatureLoss, LogitLoss
from ..losses.modules import WeightedSum
from ..signals import Signal, Teacher
from .base import Method, TrainingRows

Loss: TypeAlias = Callable[..., Tensor | dict[str, Tensor]]


class LogitMethod(Method):
    """One forward pass of the student and a loss on its logits.

    Args:
        loss: Called as ``loss(student_logits, teacher_logits, target)``; returns a scalar or a dict of
            scalars with the key ``"loss"``, as `luce.WeightedSum` does. Without a teacher the second
            argument is None.
    Raises:
        TypeError: If it is a loss on features.
    """

    def __init__(self, loss: Loss) -> None:
        super().__init__()
        if isinstance(loss, FeatureLoss):
            raise TypeError(
                f"expected a loss on logits, got {type(loss).__name__}, which compares features; "
                "wrap it in a luce.methods.FeatureMethod, which says where they are"
            )
        self.loss = loss
        self.needs_teacher = getattr(loss, "takes_teacher", True)
        self.uses_unlabelled = getattr(loss, "uses_unlabelled", True)
        self.needs_preparation = getattr(loss, "needs_preparation", False)

    def prepare(self, teacher: Teacher, rows: TrainingRows) -> dict[str, float]:
        if not isinstance(self.loss, (LogitLoss, WeightedSum)):
            return {}
        answers = [(teacher.signal(batch).logits, batch["target"]) for batch in rows.batches()]
        return self.loss.prepare(*(torch.cat(part) for part in zip(*answers, strict=True)))

    def set_epoch(self, epoch: int) -> None:
        if isinstance(self.loss, (LogitLoss, WeightedSum)):
            self.loss.set_epoch(epoch)

    def step(
        self, student: nn.Module, batch: Mapping[str, Tensor], signal: Signal | None
    ) -> dict[str, Tensor]:
        return self.terms(student(batch["input"]), batch, signal)

    def terms(
        self, student_logits: Tensor, batch: Mapping[str, Tensor], signal: Signal | None
    ) -> dict[str, Tensor]:
        """The terms of the loss on logits that are there already."""
        teacher_logits = None if signal is None else signal.logits
        value = self.loss(student_logits, teacher_logits, batch["target"])
        return value if isinstance(value, dict) else {"loss": value}
