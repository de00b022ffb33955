"""Plackett-Luce Distillation, one value per row."""

from __future__ import annotations

from torch import Tensor

from ..engines import choose
from ..fused import declare, fused
from .bounds import truncation_bound
from .options import EVERY_PLACE, PldOptions, Ties, default_tolerance
from .reference import given_ranking, label_first, pld_rows, ranking_nll, teacher_order

__all__ = [
    "EVERY_PLACE",
    "EXACT",
    "PldOptions",
    "Ties",
    "default_tolerance",
    "given_ranking",
    "label_first",
    "pld",
    "pld_with_bound",
    "ranking_nll",
    "teacher_order",
]

declare("pld", pld_rows, triton="luce.ops.pld.triton", with_bound=True)
EXACT = PldOptions()


def pld_with_bound(
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None = None,
    *,
    weight: Tensor | None = None,
    order: Tensor | None = None,
    options: PldOptions = EXACT,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Return `pld` and how far it can be from the full, exactly sorted loss.

    Returns:
        The values, and ``(rows, 2)``: for each row the largest possible difference of the value and of the
        gradient's L1 norm. Zero, up to rounding, unless places are left out or classes left unsorted.
    """
    target = None if target is None else target.contiguous()
    weight = None if weight is None else weight.contiguous()
    if choose(backend, student, teacher, no_kernel=_no_kernel(options)) == "reference":
        values = pld_rows(student, teacher, target, weight, order, options)
        bound = values.new_zeros(values.numel(), 2)
    else:
        values, bound = fused("pld", student, teacher, target, weight, order, *options)
    if options.top_k != EVERY_PLACE or options.epsilon:
        bound = truncation_bound(student.detach(), teacher, target, weight, order, options)
    return values, bound


def pld(
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None = None,
    *,
    weight: Tensor | None = None,
    order: Tensor | None = None,
    options: PldOptions = EXACT,
    backend: str = "auto",
) -> Tensor:
    """Return one PLD value per row: the label first, then the teacher's order, weighted by its probabilities.

    Args:
        student: ``(N, C)`` or ``(N, C, M)`` of any strides, float16, bfloat16, float32 or float64.
        teacher: Same shape, any of these dtypes; only the reference passes a gradient on to it.
        target: ``(N,)`` or ``(N, M)``, int64: a class, or -1 where a row has no label. None for no labels.
        weight: Multiplies each row's value; rows of weight 0 are skipped, whatever they contain.
        order: `teacher_order` of the rows if it is already known, in the shape of the logits, int64 or int32.
        options: All other options; by default the exact loss at temperature 1.
        backend: ``"auto"``, ``"cpu"``, ``"gpu"`` or ``"reference"``.
    Returns:
        ``(N,)`` or ``(N, M)``, in nats, float32 or, if either network is, float64.
    Example:
        >>> import torch
        >>> student, teacher = torch.tensor([[0.5, -1.0, 2.0, 0.3]]), torch.tensor([[2.0, 1.0, 0.1, -1.0]])
        >>> pld(student, teacher, torch.tensor([2]))
        tensor([0.8530])
    """
    target = None if target is None else target.contiguous()
    weight = None if weight is None else weight.contiguous()
    if choose(backend, student, teacher, no_kernel=_no_kernel(options)) == "reference":
        return pld_rows(student, teacher, target, weight, order, options)
    return fused("pld", student, teacher, target, weight, order, *options)[0]


def _no_kernel(options: PldOptions) -> str | None:
    """Return which option the Triton kernels lack; they sort every class, whatever the tolerance."""
    if options.average_ties:
        return "there is no Triton kernel for ties='average'"
    return "there is no Triton kernel for epsilon" if options.epsilon else None
