"""Rows, masks, weights and reductions: the only code of the losses that handles them.

Losses with a fused operator use `Blocks`: the logits in their own layout, with one weight per row that
already contains the reduction. All other losses use `Rows`: a matrix of student logits and one of teacher
logits. Each loss computes one value per row; masking and reduction happen here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .. import checks
from ..labels import UNLABELLED
from ..ops._rows import as_matrix, wide_dtype
from ._teacher import as_teacher

Reduction = Literal["none", "mean", "sum"]


@dataclass(frozen=True)
class Blocks:
    """Logits with their classes second, in their own dtypes and strides, with labels and weights of the rows.

    Attributes:
        student: ``(N, C)`` or ``(N, C, M)``.
        teacher: Same shape, detached (but see `teacher_gradient`); None where a loss has no teacher.
        target: ``(N,)`` or ``(N, M)``, int64, `UNLABELLED` in rows without a label; None if not given.
        weight: Same shape, 0 in rows that do not count; None if all rows count alike.
        labels_matter: Whether the loss reads the label as a class, beyond `ignore_index`.
        axis: The caller's dimension of the classes.
        shape: The shape of one value per row, in the caller's layout.
    """

    student: Tensor
    teacher: Tensor | None
    target: Tensor | None
    weight: Tensor | None
    labels_matter: bool
    axis: int
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
    ) -> Blocks:
        """Check the arguments of a loss and lay out its rows.

        Args:
            unlabelled_index: The label of rows without one; None for a loss that compares labels with
                `ignore_index` only, so that they need not name a class.
            needs_label: Give rows without a label the weight 0.
            needs_teacher: False for a loss that does not use a teacher.
        """
        checks.check_logits("student_logits", student_logits)
        checks.check_int64(ignore_index=ignore_index, unlabelled_index=unlabelled_index, class_dim=class_dim)
        if needs_teacher:
            checks.check_given("teacher_logits", teacher_logits)
        if needs_label:
            checks.check_given("target", target)
        if teacher_logits is not None:
            checks.check_logits("teacher_logits", teacher_logits, like=student_logits)
        axis = checks.class_axis(student_logits, class_dim)
        shape = student_logits.shape[:axis] + student_logits.shape[axis + 1 :]
        student = _as_block(student_logits, axis)
        teacher = None if teacher_logits is None else _as_block(as_teacher(teacher_logits), axis)
        rows = student.shape[:1] + student.shape[2:]

        # Weights in the wide dtype too: bfloat16 cannot represent 257, the sum of 257 weights of 1.
        wide = wide_dtype(student, teacher)
        weight = None
        if row_weight is not None:
            checks.check_per_row("row_weight", row_weight, shape, student_logits)
            weight = row_weight.reshape(rows).to(wide)
        if target is not None:
            checks.check_target(target, shape, student_logits)
            target = target.reshape(rows).long()
            idle = target == ignore_index
            if unlabelled_index is not None and needs_label:
                idle |= target == unlabelled_index
            if unlabelled_index is not None and unlabelled_index != UNLABELLED:
                no_class = (target == UNLABELLED) & ~idle
                if can_ask(target) and bool(no_class.any()):
                    raise checks.wrong_label(UNLABELLED, student.shape[1])
                # -1 would now read as unlabelled; -2 stays outside the classes.
                target = target.masked_fill(no_class, -2).masked_fill(target == unlabelled_index, UNLABELLED)
            # To read `idle` would stall a GPU, so there the weights are made in any case.
            if not can_ask(idle) or bool(idle.any()):
                weight = student.new_ones(rows, dtype=wide) if weight is None else weight
                weight = weight.masked_fill(idle, 0)
        return cls(student, teacher, target, weight, unlabelled_index is not None, axis, shape)

    def given_teacher(self) -> Tensor:
        assert self.teacher is not None
        return self.teacher

    def labels(self) -> Tensor:
        assert self.target is not None
        return self.target

    def laid_out(self, per_class: Tensor) -> Tensor:
        """Return a tensor of the caller's shape in the layout of the blocks."""
        return _as_block(per_class, self.axis)

    def reduce(
        self, rows: Callable[[Tensor | None], Tensor], reduction: Reduction, factor: float = 1.0
    ) -> Tensor:
        """Reduce the rows' values to the caller's shape or to a scalar; the mean divides by the weights.

        The sum and the mean of no rows are a differentiable zero.

        Args:
            rows: Takes a weight per row (None for 1 everywhere) and returns each row's value times its
                weight, and 0 for rows of weight 0 whatever they contain.
            factor: Multiplies every value.
        Raises:
            ValueError: If a row that counts has a label outside the classes. On a CUDA device and under
                ``torch.compile``, where the check would stall, the value of that row is NaN instead.
        """
        checks.check_reduction(reduction)
        share = self._share(reduction, factor)
        if share is not None and share.requires_grad:  # operators give no gradient to their weights
            # Rows of weight 0 stay out of the operator: 0 times their NaN would be NaN.
            values = share * rows((share != 0).to(share.dtype))
        else:
            values = rows(share)
        result = values.reshape(self.shape) if reduction == "none" else values.sum()
        # Operators return NaN for a label outside the classes, so only a NaN is worth a check of all labels.
        if self.target is not None and self.labels_matter and can_ask(result) and _has_nan(result):
            self.check_labels()
        return result

    def _share(self, reduction: Reduction, factor: float) -> Tensor | None:
        """Return the factor of each row in the sum of all rows; None for 1 everywhere."""
        if self.weight is None:
            rows = self.student.shape[:1] + self.student.shape[2:]
            if reduction == "mean":
                # Without rows the mean is the empty sum, 0; a division by 0 would raise.
                factor /= max(rows.numel(), 1)
            if factor == 1:
                return None
            return self.student.new_full(rows, factor, dtype=wide_dtype(self.student, self.teacher))
        if reduction != "mean":
            return self.weight if factor == 1 else self.weight * factor
        total = self.weight.sum()
        # If all weights are 0 the mean is 0, where 0 / 0 would be NaN.
        return self.weight * (factor / torch.where(total == 0, 1, total))

    def check_labels(self) -> None:
        """Raise ValueError if a row that counts has a label outside the classes; reads the labels."""
        wrong = self.wrong_labels()
        if bool(wrong.any()):
            assert self.target is not None
            raise checks.wrong_label(int(self.target[wrong][0]), self.student.shape[1])

    def wrong_labels(self) -> Tensor:
        """Return True for rows that count with a label outside the classes or excluded in both networks."""
        assert self.target is not None
        classes = self.student.shape[1]
        wrong = (self.target < UNLABELLED) | (self.target >= classes)
        if self.teacher is not None:
            # Clamped: gather would raise an index error in place of the message about the label.
            named = self.target.clamp(0, classes - 1).unsqueeze(1)
            excluded = [
                block.gather(1, named).squeeze(1) == -torch.inf for block in (self.student, self.teacher)
            ]
            wrong = wrong | (excluded[0] & excluded[1] & (self.target != UNLABELLED))
        return wrong if self.weight is None else wrong & (self.weight != 0)


def _as_block(logits: Tensor, axis: int) -> Tensor:
    """Return ``(N, C)`` where the classes come last, else ``(N, C, M)``; a view where strides allow."""
    if logits.ndim == 2 and axis == 1:
        return logits
    before, after = logits.shape[:axis].numel(), logits.shape[axis + 1 :].numel()
    last = axis == logits.ndim - 1
    return logits.reshape((before, logits.shape[axis]) if last else (before, logits.shape[axis], after))


def _has_nan(values: Tensor) -> bool:
    return math.isnan(values.item()) if values.ndim == 0 else bool(values.isnan().any())


def can_ask(tensor: Tensor) -> bool:
    """Return whether values can be read without stalling a device or breaking a compiled graph."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


@dataclass(frozen=True)
class Rows:
    """Logits as matrices, with labels, weights and the shape of the result.

    Attributes:
        student: ``(N, C)``, float32 or float64.
        teacher: ``(N, C)``, same dtype, detached; the student's own logits where a loss has no teacher.
        target: ``(N,)`` class indices, `UNLABELLED` in rows without a label; None if the loss got none.
        weight: ``(N,)``, 0 in rows that do not count.
        shape: The shape of one value per row, in the caller's layout.
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
        """Check the arguments as `Blocks.of` does, and return matrices of rows."""
        blocks = Blocks.of(
            student_logits,
            teacher_logits,
            target,
            row_weight,
            class_dim=class_dim,
            ignore_index=ignore_index,
            unlabelled_index=unlabelled_index,
            needs_label=needs_label,
            needs_teacher=needs_teacher,
        )
        dtype = wide_dtype(blocks.student, blocks.teacher)
        student = as_matrix(blocks.student).to(dtype)
        # The student in the teacher's place makes `present` depend on the student alone.
        teacher = student.detach() if blocks.teacher is None else as_matrix(blocks.teacher).to(dtype)
        if blocks.weight is None:
            weight = student.new_ones(student.shape[:1])
        else:
            weight = blocks.weight.reshape(-1)
            # 0 times NaN is NaN: a NaN in a row of weight 0 would otherwise reach the sum and the gradient.
            idle = (weight == 0)[:, None]
            student, teacher = student.masked_fill(idle, 0), teacher.masked_fill(idle, 0)
        if blocks.target is None:
            return cls(student, teacher, None, weight, blocks.shape)
        labels = blocks.target.reshape(-1)
        if blocks.labels_matter:
            if can_ask(weight):
                blocks.check_labels()
            else:  # without this a label outside the classes would pass for an unlabelled row
                weight = weight.masked_fill(blocks.wrong_labels().reshape(-1), torch.nan)
            # A row of weight 0 may carry any label, which must never become an index.
            labels = labels.masked_fill(weight == 0, UNLABELLED)
        return cls(student, teacher, labels, weight, blocks.shape)

    def labels(self) -> Tensor:
        """Return ``(N,)`` class indices, `UNLABELLED` everywhere without a target."""
        if self.target is not None:
            return self.target
        return torch.full(self.student.shape[:1], UNLABELLED, device=self.student.device)

    def present(self) -> Tensor:
        """Return ``(N, C)``, False for a class excluded (``-inf``) in both networks: it does not exist."""
        return (self.student != -torch.inf) | (self.teacher != -torch.inf)

    def reduce(self, values: Tensor, reduction: Reduction) -> Tensor:
        """Reduce one value per row to the caller's shape or to a scalar; the mean divides by the weights.

        The sum and the mean of no rows are a differentiable zero.
        """
        checks.check_reduction(reduction)
        # A value that does not count may be infinite, and 0 * inf is NaN.
        values = torch.where(self.weight == 0, 0, self.weight * values)
        if reduction == "none":
            return values.reshape(self.shape)
        total = values.sum()
        if reduction == "sum":
            return total
        weight = self.weight.sum()
        # Without rows that count the mean is a differentiable 0, where 0 / 0 would be NaN.
        return total / torch.where(weight == 0, 1, weight)
