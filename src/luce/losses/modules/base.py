"""What all loss modules share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import ClassVar

import torch
from torch import Tensor, nn

from .._reduce import Reduction


@dataclass(eq=False, repr=False, kw_only=True)
class LogitLoss(nn.Module):
    """A loss function with its options. Subclasses are dataclasses whose fields are the function's options.

    All are called alike, ``loss(student_logits, teacher_logits, target)``, so that they can be exchanged and
    summed. Options are checked when the module is made.
    """

    function: ClassVar[Callable[..., Tensor]]
    takes_teacher: ClassVar[bool] = True
    uses_unlabelled: ClassVar[bool] = True
    """Whether a row without a label can teach anything."""

    ignore_index: int = -100
    class_dim: int = 1
    reduction: Reduction = "mean"

    def __post_init__(self) -> None:
        super().__init__()
        # The function knows its own rules: using the options once, on the smallest input, checks them all.
        logits, target = torch.zeros(1, 2), torch.zeros(1, dtype=torch.long)
        self._call(logits, logits, target, None, class_dim=1)

    @property
    def needs_preparation(self) -> bool:
        """Whether `prepare` must be called before the first batch."""
        return False

    def prepare(self, teacher_logits: Tensor, target: Tensor) -> dict[str, float]:
        """Learn what must be known of the teacher before training; most losses need nothing.

        Args:
            teacher_logits: Of the training rows, ``(rows, C)``, without temperature.
            target: Their labels, ``(rows,)``; `UNLABELLED` where there is none.
        Returns:
            What was found, by name, as far as a reader of the run would want to know it.
        """
        return {}

    def set_epoch(self, epoch: int) -> None:
        """AnswerKind before each epoch, counted from 1; most losses do not change with it."""

    def options(self) -> dict[str, object]:
        """The options as keyword arguments of the function."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor | None,
        target: Tensor | None = None,
        row_weight: Tensor | None = None,
    ) -> Tensor:
        """The loss of a batch; shapes and errors are those of the function."""
        return self._call(student_logits, teacher_logits, target, row_weight)

    def _call(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor | None,
        target: Tensor | None,
        row_weight: Tensor | None,
        **override: int,
    ) -> Tensor:
        logits = (student_logits, teacher_logits) if self.takes_teacher else (student_logits,)
        return type(self).function(*logits, target, row_weight=row_weight, **{**self.options(), **override})

    def extra_repr(self) -> str:
        changed = (f for f in fields(self) if getattr(self, f.name) != f.default)
        return ", ".join(f"{f.name}={getattr(self, f.name)!r}" for f in changed)
