"""The only code that knows rows, masks, weights and reductions.

A loss sees `Rows`: a matrix of student logits and one of teacher logits, one row per decision. It returns
one value per row, and `Rows.reduce` does the rest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from . import _check

Reduction = Literal["none", "mean", "sum"]
UNLABELLED = -1
"""The label of a row that has none: the place of a class that no label names."""


def _spoil_wrong_labels(weight: Tensor, labels: Tensor, student: Tensor, teacher: Tensor | None) -> Tensor:
    """Raise if a row that counts has a label of no class; where asking would stall the device, spoil the row.

    Its weight becomes NaN, which is not overlooked: a label that matches no class could else pass for none.
    """
    classes = student.shape[-1]
    wrong = (labels < 0) | (labels >= classes)
    if teacher is not None:  # a class that both networks exclude does not exist
        named = labels.clamp(0, classes - 1)[:, None]
        wrong |= ((student.gather(-1, named) == -torch.inf) & (teacher.gather(-1, named) == -torch.inf))[:, 0]
    wrong &= weight != 0
    if student.device.type != "cpu" or torch.compiler.is_compiling():
        return weight.masked_fill(wrong, torch.nan)
    if wrong.any():
        raise _check.wrong_label(int(labels[wrong][0]), classes)
    return weight


@dataclass(frozen=True)
class Rows:
    """Logits as matrices, with what is needed to put one value per row back into shape.

    Attributes:
        student: ``(N, C)``, float32 or float64.
        teacher: ``(N, C)``, same dtype, detached; the student's own logits where a loss has no teacher.
        target: ``(N,)`` class indices, `UNLABELLED` in rows without a label; None if the loss got none.
        weight: ``(N,)``, 0 in rows that do not count.
        shape: The shape of one value per row, as the caller counts rows.
    """

    student: Tensor
    teacher: Tensor
    target: Tensor | None
    weight: Tensor
    shape: torch.Size

    @classmethod
    def of(
        cls,
        student_logits: Tensor,
        teacher_logits: Tensor | None,
        target: Tensor | None,
        row_weight: Tensor | None,
        *,
        class_dim: int,
        ignore_index: int,
        unlabelled_index: int | None = None,
        needs_label: bool = False,
        needs_teacher: bool = True,
    ) -> Rows:
        """Check the arguments and lay the logits out as rows.

        Args:
            unlabelled_index: The label of rows without one; None if the loss does not look at labels
                beyond `ignore_index`, which then need not name a class.
            needs_label: Rows without a label do not count.
            needs_teacher: False for a loss that never looks at a teacher.
        """
        _check.check_logits("student_logits", student_logits)
        if needs_teacher:
            _check.check_given("teacher_logits", teacher_logits)
        if needs_label:
            _check.check_given("target", target)
        if teacher_logits is not None:
            _check.check_logits("teacher_logits", teacher_logits, like=student_logits)
        axis = _check.class_axis(student_logits, class_dim)
        shape = torch.Size(n for d, n in enumerate(student_logits.shape) if d != axis)

        # Sixteen-bit logits are data; their differences and exponentials need at least float32.
        dtype = torch.promote_types(student_logits.dtype, torch.float32)
        if teacher_logits is not None:
            dtype = torch.promote_types(dtype, teacher_logits.dtype)

        def as_matrix(logits: Tensor) -> Tensor:
            return logits.movedim(axis, -1).reshape(-1, logits.shape[axis]).to(dtype)

        student = as_matrix(student_logits)
        teacher = None if teacher_logits is None else as_matrix(teacher_logits.detach())
        weight = student.new_ones(student.shape[:1])
        if row_weight is not None:
            _check.check_per_row("row_weight", row_weight, shape, student_logits)
            weight = row_weight.reshape(-1).to(dtype)
        labels = None
        if target is not None:
            _check.check_target(target, shape, student_logits)
            labels = target.reshape(-1).long()
            weight = weight.masked_fill(labels == ignore_index, 0)
            if unlabelled_index is not None:
                unlabelled = (labels == unlabelled_index) | (labels == ignore_index)
                labelled_weight = weight.masked_fill(unlabelled, 0)
                checked = _spoil_wrong_labels(labelled_weight, labels, student, teacher)
                weight = checked if needs_label else torch.where(unlabelled, weight, checked)
                labels = labels.masked_fill(unlabelled, UNLABELLED)

        teacher = student.detach() if teacher is None else teacher
        if target is not None or row_weight is not None:
            # What stands in a row that does not count must not matter, not even a NaN.
            idle = (weight == 0)[:, None]
            student, teacher = student.masked_fill(idle, 0), teacher.masked_fill(idle, 0)
        return cls(student, teacher, labels, weight, shape)

    def labels(self) -> Tensor:
        """``(N,)`` class indices, `UNLABELLED` everywhere if the caller gave none."""
        if self.target is not None:
            return self.target
        return torch.full(self.student.shape[:1], UNLABELLED, device=self.student.device)

    def present(self) -> Tensor:
        """``(N, C)``: False where a class is -inf in both networks, which means that it does not exist."""
        return (self.student != -torch.inf) | (self.teacher != -torch.inf)

    def reduce(self, values: Tensor, reduction: Reduction) -> Tensor:
        """One value per row, to the caller's shape or to a scalar; the mean is over the weight.

        An empty selection sums to a differentiable zero, and so does its mean.
        """
        _check.check_reduction(reduction)
        values = torch.where(self.weight == 0, 0, self.weight * values)
        if reduction == "none":
            return values.reshape(self.shape)
        total = values.sum()
        if reduction == "sum":
            return total
        weight = self.weight.sum()
        return total / torch.where(weight == 0, 1, weight)
