"""Plackett-Luce Distillation, one value per row."""

from __future__ import annotations

from torch import Tensor

from ..engines import choose
from . import cpu
from .bounds import truncation_bound
from .options import PldOptions, default_tolerance
from .plain import pld_rows
from .reference import label_first, ranking_nll, teacher_order

__all__ = [
    "PldOptions",
    "default_tolerance",
    "label_first",
    "pld",
    "pld_with_bound",
    "ranking_nll",
    "teacher_order",
]


def pld_with_bound(
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None = None,
    *,
    weight: Tensor | None = None,
    order: Tensor | None = None,
    options: PldOptions | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`pld` and how far it can be from the full, exactly sorted loss.

    Returns:
        The values, and ``(rows, 2)``: for each row the largest possible difference of the value and of the
        gradient's L1 norm. Zero, up to rounding, unless places were left out or classes left unsorted.
    """
    options = options or PldOptions()
    if choose(backend, student, teacher, no_kernel=_no_kernel(options)) != "reference":
        values, bound = cpu.pld(student, teacher, target, weight, order, options)
    else:
        values = pld_rows(student, teacher, target, weight, order, options)
        bound = values.new_zeros(values.numel(), 2)
    if options.top_k is not None or options.epsilon is not None:
        bound = truncation_bound(student.detach(), teacher, target, weight, order, options)
    return values, bound


def pld(
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None = None,
    *,
    weight: Tensor | None = None,
    order: Tensor | None = None,
    options: PldOptions | None = None,
    backend: str = "auto",
) -> Tensor:
    """One PLD value per row: label first, then the teacher's order, weighted by the teacher's probabilities.

    Args:
        student: ``(N, C)`` or ``(N, C, M)`` of any strides, float16, bfloat16, float32 or float64.
        teacher: Same shape, any of these dtypes; only the reference passes a gradient on to it.
        target: ``(N,)`` or ``(N, M)``, int64: a class, or -1 where a row has no label. None for no labels.
        weight: What each row's value is multiplied by; rows of weight 0 are not looked at.
        order: `teacher_order` of the rows if it is known already, shaped like the logits, int64 or int32.
        options: Everything else; None for the exact loss at temperature 1.
        backend: ``"auto"``, ``"cpu"``, ``"gpu"`` or ``"reference"``.
    Returns:
        ``(N,)`` or ``(N, M)``, in nats, float32 or, if either network is, float64.
    Example:
        >>> import torch
        >>> student, teacher = torch.tensor([[0.5, -1.0, 2.0, 0.3]]), torch.tensor([[2.0, 1.0, 0.1, -1.0]])
        >>> pld(student, teacher, torch.tensor([2]))
        tensor([0.8530])
    """
    options = options or PldOptions()
    if choose(backend, student, teacher, no_kernel=_no_kernel(options)) != "reference":
        return cpu.pld(student, teacher, target, weight, order, options)[0]
    return pld_rows(student, teacher, target, weight, order, options)


def _no_kernel(options: PldOptions) -> str | None:
    """What Triton's kernels cannot do; all else they do exactly, whatever the tolerance."""
    if options.ties == "average":
        return "there is no Triton kernel for ties='average'"
    return None if options.epsilon is None else "there is no Triton kernel for epsilon"
