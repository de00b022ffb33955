"""The operator in plain PyTorch, on the operators' layout and with weights; in blocks if classes are many."""

from __future__ import annotations

from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .._rows import weighted_rows
from .reference import one_minus_tau, total_agreement, widened

PAIRS = 2**21
"""How many pairs of classes are looked at together, in all rows."""


def rkkd_rows(
    student: Tensor,
    teacher: Tensor,
    weight: Tensor | None,
    form: str,
    steepness: float,
    block: int | None = None,
) -> Tensor:
    """As the native engine.

    Args:
        student: ``(N, C)`` or ``(N, C, M)``.
        teacher: Same shape.
        weight: ``(N,)`` or ``(N, M)``, or None.
        form: One of `luce.ops.rkkd.FORMS`.
        steepness: Above 0.
        block: How many classes are compared with all others at a time; None for as many as `PAIRS` allows.
    """

    def formula(s: Tensor, t: Tensor) -> Tensor:
        width = block or max(1, PAIRS // max(1, s.numel()))
        return rkkd_in_blocks(s, t, form, steepness, width)

    return weighted_rows(formula, student, teacher, weight)


def rkkd_in_blocks(student: Tensor, teacher: Tensor, form: str, steepness: float, width: int) -> Tensor:
    """`reference.rkkd` with memory for ``(N, C, width)``: going back, each block is computed again."""
    s, t = widened(student), widened(teacher)
    classes = s.shape[-1]
    total = s.new_zeros(s.shape[0])
    for first in range(0, classes, width):
        arguments = s, t, form, steepness, first, min(width, classes - first)
        if width >= classes:
            total = total_agreement(*arguments)
        else:
            total = total + checkpoint(
                total_agreement, *arguments, use_reentrant=False, preserve_rng_state=False
            )
    return one_minus_tau(total, s, t).to(student.dtype)
