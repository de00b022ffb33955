"""Distillation through the logits, with any loss of `luce.losses` or a loss of your own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ..errors import UserError, listed, one_line
from ..losses import FeatureLoss
from ..signals import Signal, Teacher
from .base import Prepares, TrainingRows
from .observation import observe

Loss: TypeAlias = Callable[..., Tensor | dict[str, Tensor]]


class LogitMethod(Prepares):
    """One forward pass of the student and a loss on its logits.

    Args:
        loss: Called as ``loss(student_logits, teacher_logits, target)``; returns a scalar or a dict of
            scalars with the key ``"loss"``, as `luce.WeightedSum` does. Without a teacher the second
            argument is None. A loss may have the attributes and methods of `luce.losses.LogitLoss`, such as
            ``uses_unlabelled``, ``prepare`` and ``set_epoch``.
    Raises:
        UserError: If it is a loss on features, or cannot be called.
    """

    def __init__(self, loss: Loss) -> None:
        super().__init__()
        if isinstance(loss, FeatureLoss):
            raise UserError(
                f"expected a loss on logits, got {type(loss).__name__}, which compares features; "
                "pass it to a luce.methods.FeatureMethod, which names the modules that compute them"
            )
        if not callable(loss) or isinstance(loss, type):
            raise UserError(f"expected a loss such as luce.KDLoss(), or a function, got {loss!r}")
        self.loss: Any = loss
        self.needs_teacher = getattr(loss, "takes_teacher", True)
        self.uses_unlabelled = getattr(loss, "uses_unlabelled", True)
        self.needs_preparation = getattr(loss, "needs_preparation", False)

    def prepare(self, teacher: Teacher, rows: TrainingRows) -> dict[str, float]:
        answers = [(teacher.signal(batch).logits, batch["target"]) for batch in rows.batches()]
        return self.prepare_loss(*(torch.cat(part) for part in zip(*answers, strict=True)))

    def prepare_loss(self, teacher_logits: Tensor, target: Tensor) -> dict[str, float]:
        """Prepare the loss, if it needs that, with the teacher's logits ``(N, C)`` and labels ``(N,)``."""
        if not self.needs_preparation:
            return {}
        results: dict[str, float] = self.loss.prepare(teacher_logits, target)
        return results

    def set_epoch(self, epoch: int) -> None:
        if hasattr(self.loss, "set_epoch"):
            self.loss.set_epoch(epoch)

    def step(
        self, student: nn.Module, batch: Mapping[str, Tensor], signal: Signal | None
    ) -> dict[str, Tensor]:
        return self.terms(student(batch["input"]), batch, signal)

    def terms(
        self, student_logits: Tensor, batch: Mapping[str, Tensor], signal: Signal | None
    ) -> dict[str, Tensor]:
        """Return the terms of the loss for logits that the student has computed already."""
        observe(batch, signal, {})
        teacher_logits = None if signal is None else signal.logits
        try:
            value = self.loss(student_logits, teacher_logits, batch["target"])
        except (ValueError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # of a loss that was written for other arguments: anything
            raise UserError(
                f"cannot call the loss `{_name(self.loss)}` as loss(student_logits, teacher_logits, target): "
                f"it raised {type(error).__name__}: {one_line(error)}; wrap a loss of other arguments, as in "
                "`lambda student_logits, teacher_logits, target: loss(student_logits, target)`"
            ) from error
        terms = value if isinstance(value, dict) else {"loss": value}
        if not isinstance(terms.get("loss"), Tensor):
            got = f"a dict with {listed(map(repr, value))}" if value is terms else type(value).__name__
            raise UserError(
                f"expected the loss `{_name(self.loss)}` to return a tensor, or a dict of tensors with the "
                f"key `loss`, got {got}"
            )
        return terms


def _name(loss: Any) -> str:
    return getattr(loss, "__name__", type(loss).__name__)
