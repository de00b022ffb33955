"""Convert the operators' layout, ``(N, C)`` or ``(N, C, M)``, to matrices and back."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def wide_dtype(student: Tensor, teacher: Tensor | None = None) -> torch.dtype:
    """Return the dtype of the calculation: exponentials of 16-bit logits need float32 at least."""
    wide = torch.promote_types(student.dtype, torch.float32)
    return wide if teacher is None else torch.promote_types(wide, teacher.dtype)


def as_matrix(block: Tensor) -> Tensor:
    """Return ``(N, C)`` as it is, and ``(N, C, M)`` row after row as ``(N * M, C)``."""
    return block if block.ndim == 2 else block.movedim(1, -1).reshape(-1, block.shape[1])


def named_classes(labels: Tensor, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Return the labels, clamped to classes that exist, and where both networks exclude that class.

    Args:
        labels: ``(R,)``.
        student: ``(R, C)``.
        teacher: ``(R, C)``.
    """
    named = labels.clamp(0, student.shape[-1] - 1)
    logits = torch.stack([student, teacher]).gather(-1, named.expand(2, -1)[..., None])
    return named, (logits == -torch.inf).all(0)[:, 0]


def weighted_rows(
    formula: Callable[[Tensor, Tensor], Tensor], student: Tensor, teacher: Tensor, weight: Tensor | None
) -> Tensor:
    """Apply a formula for matrices to blocks of any dtype, with weights.

    Args:
        formula: ``(R, C)`` student and teacher logits to ``(R,)``.
        student: ``(N, C)`` or ``(N, C, M)``.
        teacher: Same shape.
        weight: ``(N,)`` or ``(N, M)``, or None for 1 everywhere. Rows of weight 0 give 0, whatever they
            contain.
    Returns:
        ``(N,)`` or ``(N, M)``, float32 or float64.
    """
    dtype = wide_dtype(student, teacher)
    s, t = as_matrix(student).to(dtype), as_matrix(teacher).to(dtype)
    if weight is None:
        values = formula(s, t)
    else:
        flat = weight.reshape(-1)
        idle = (flat == 0)[:, None]
        # Before the formula, not after: NaN in a row of weight 0 would make 0 * NaN in the gradient.
        values = formula(s.masked_fill(idle, 0), t.masked_fill(idle, 0))
        values = torch.where(idle[:, 0], 0, flat * values)
    return values.reshape(student.shape[:1] + student.shape[2:])
