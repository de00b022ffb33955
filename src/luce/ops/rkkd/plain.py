"""The operator in plain PyTorch, on the operators' layout and with weights; in blocks if classes are many."""

from __future__ import annotations

from torch import Tensor

from .._pairs import sum_over_pairs
from .._rows import weighted_rows
from .reference import one_minus_tau, total_agreement, widened


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
        block: How many classes are compared with all others at a time; None to choose by memory.
    """

    def formula(s: Tensor, t: Tensor) -> Tensor:
        return rkkd_in_blocks(s, t, form, steepness, block)

    return weighted_rows(formula, student, teacher, weight)


def rkkd_in_blocks(
    student: Tensor, teacher: Tensor, form: str, steepness: float, width: int | None
) -> Tensor:
    """`reference.rkkd` with memory for ``(N, C, width)``."""
    s, t = widened(student), widened(teacher)

    def part(s: Tensor, t: Tensor, first: int, count: int) -> Tensor:
        return total_agreement(s, t, form, steepness, first, count)

    return one_minus_tau(sum_over_pairs(part, s, t, width), s, t).to(student.dtype)
