"""What a distillation method is to the training loop."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext

from torch import Tensor, nn

from ..signals import Signal, Teacher

Batch = Mapping[str, Tensor]


class Method(nn.Module, ABC):
    """What one training step does with the student, a batch and the teacher's signal.

    Parameters of a method are trained beside the student's and stay out of the exported student.

    Attributes:
        needs_teacher: Whether a step looks at a signal.
        uses_unlabelled: Whether a row without a label can teach anything.
        wants_preparation: Whether `prepare` must be called before training.
        two_views: Whether a step looks at ``batch["strong"]``, a second view of the same rows, too.
    """

    needs_teacher: bool = True
    uses_unlabelled: bool = True
    wants_preparation: bool = False
    two_views: bool = False

    def build(
        self,
        student: nn.Module,
        teacher: Teacher | None,
        sample: Batch,
        rows: Batch,
    ) -> None:
        """Make the parts that depend on the networks and the data, before anything is restored or trained.

        Args:
            student: On its device, as it starts. It must be left as it is, but for what the method itself
                settles, such as a classifier that it takes over.
            teacher: That will answer the batches; None without one.
            sample: A batch of a few rows.
            rows: ``index`` and ``target`` of all training rows; a target of -1 where there is none.
        Raises:
            UserError: If the networks or the data do not suit the method.
        """

    def attached(self, student: nn.Module, teacher: Teacher | None) -> AbstractContextManager[None]:
        """What must hold while steps are made, such as hooks on the networks; for a ``with`` block."""
        return nullcontext()

    def prepare(self, teacher_logits: Tensor, target: Tensor) -> dict[str, float]:
        """Learn what must be known of the teacher before training.

        Args:
            teacher_logits: Of the training rows, ``(rows, C)``.
            target: Their labels, ``(rows,)``; -1 where there is none.
        Returns:
            What was found, by name, as far as a reader of the run would want to know it.
        """
        return {}

    def set_epoch(self, epoch: int) -> None:
        """Told before each epoch, counted from 1."""

    @abstractmethod
    def step(self, student: nn.Module, batch: Batch, signal: Signal | None) -> dict[str, Tensor]:
        """Named scalar terms of the batch's loss, among them ``"loss"``, the one to descend."""
