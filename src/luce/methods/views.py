"""Any method on two views of each batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager

from torch import Tensor, nn

from .. import checks
from ..errors import UserError
from ..signals import Signal, Teacher
from .base import Batch, Method, TrainingRows


def strong_view(batch: Batch) -> dict[str, Tensor]:
    """A batch as its strongly augmented view shows it.

    Example:
        >>> strong_view({"input": 1, "target": 2, "strong": 3})
        {'input': 3, 'target': 2}
    """
    view = {**batch, "input": batch["strong"]}
    del view["strong"]
    return view


class TwoViewMethod(Method):
    """A step of another method for each of two views of a batch, and the sum of both losses.

    The second view, ``batch["strong"]``, shows the same rows with a strong augmentation; student and teacher
    are asked about each view by itself. `luce.data.loader` makes it, and ``data.strong_augment`` in a recipe.

    Args:
        method: What a step does with one view.
        weight: Of the loss of ``batch["input"]``, above 0.
        strong_weight: Of the loss of ``batch["strong"]``, above 0.
    Raises:
        ValueError: On a weight that is not positive.
        UserError: If the method makes steps of its own, which look at one view, or has inputs of its own.
    Example:
        >>> from luce import KDLoss
        >>> from luce.methods import LogitMethod
        >>> TwoViewMethod(LogitMethod(KDLoss()), strong_weight=0.5).two_views
        True
    """

    two_views = True

    def __init__(self, method: Method, weight: float = 1.0, strong_weight: float = 1.0) -> None:
        super().__init__()
        checks.check_positive(weight=weight, strong_weight=strong_weight)
        if method.manual_optimization or method.generates_inputs:
            what = "makes steps of its own" if method.manual_optimization else "has inputs of its own"
            raise UserError(
                f"expected one view of each batch for {type(method).__name__}, which {what}; "
                "leave out `data.strong_augment`"
            )
        self.method = method
        self.weight, self.strong_weight = float(weight), float(strong_weight)
        self.needs_teacher = method.needs_teacher
        self.uses_unlabelled = method.uses_unlabelled
        self.needs_preparation = method.needs_preparation
        self.batches_per_round = method.batches_per_round
        self.quiz, self.quiz_batches = method.quiz, method.quiz_batches

    def build(self, student: nn.Module, teacher: Teacher | None, sample: Batch, rows: Batch) -> None:
        self.method.build(student, teacher, sample, rows)

    @property
    def co_trained(self) -> Mapping[str, nn.Module]:
        return self.method.co_trained

    def hooks(self, student: nn.Module, teacher: Teacher | None) -> AbstractContextManager[None]:
        return self.method.hooks(student, teacher)

    def prepare(self, teacher: Teacher, rows: TrainingRows) -> dict[str, float]:
        return self.method.prepare(teacher, rows)

    def set_epoch(self, epoch: int) -> None:
        self.method.set_epoch(epoch)

    def before_round(
        self, student: nn.Module, batches: Sequence[Batch], quiz: Sequence[Batch], learning_rate: float
    ) -> dict[str, Tensor]:
        return self.method.before_round(student, batches, quiz, learning_rate)

    def after_step(self, student: nn.Module, batch: Batch) -> dict[str, Tensor]:
        return self.method.after_step(student, batch)

    def step(self, student: nn.Module, batch: Batch, signal: Signal | None) -> dict[str, Tensor]:
        """The terms of both views; those of the second are called ``strong.NAME``."""
        terms = self.method.step(student, batch, signal)
        strong = self.method.step(student, strong_view(batch), None if signal is None else signal.strong)
        loss = self.weight * terms.pop("loss") + self.strong_weight * strong.pop("loss")
        return {
            **{name: self.weight * value for name, value in terms.items()},
            **{f"strong.{name}": self.strong_weight * value for name, value in strong.items()},
            "loss": loss,
        }
