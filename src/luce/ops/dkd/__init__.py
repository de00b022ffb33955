"""Decoupled Knowledge Distillation, one value per row, and its two parts."""

from __future__ import annotations

from torch import Tensor

from ..engines import choose
from ..fused import declare, fused
from .reference import dkd, dkd_rows

__all__ = ["dkd", "weighted_dkd"]

declare("dkd", dkd_rows, triton="luce.ops.dkd.triton")


def weighted_dkd(
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    temperature: float,
    *,
    alpha: float,
    beta: float,
    weight: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Return ``alpha * tckd + beta * nckd`` of `dkd`; a part of weight 0 is omitted, even if infinite.

    Args:
        student: ``(N, C)`` or ``(N, C, M)`` of any strides, float16, bfloat16, float32 or float64.
        teacher: Same shape, any of these dtypes; only the reference passes a gradient on to it.
        target: ``(N,)`` or ``(N, M)``, int64. A label outside [0, C), and one whose class both networks
            exclude, makes its row NaN.
        temperature: Divides both networks' logits.
        alpha: Weight of the target against the rest.
        beta: Weight of the rest among themselves.
        weight: Multiplies each row's value; rows of weight 0 are skipped, whatever they contain.
        backend: ``"auto"``, ``"cpu"``, ``"gpu"`` or ``"reference"``.
    Returns:
        ``(N,)`` or ``(N, M)``, in nats without ``temperature**2``, float32 or, if either network is, float64.
    Example:
        >>> import torch
        >>> student, teacher = torch.tensor([[0.5, -1.0, 2.0, 0.3]]), torch.tensor([[2.0, 1.0, 0.1, -1.0]])
        >>> weighted_dkd(student, teacher, torch.tensor([2]), 4.0, alpha=1.0, beta=8.0)
        tensor([0.4867])
    """
    target, weight = target.contiguous(), None if weight is None else weight.contiguous()
    arguments = teacher, target, weight, temperature, alpha, beta
    if choose(backend, student, teacher, no_kernel=None) == "reference":
        return dkd_rows(student, *arguments)
    return fused("dkd", student, *arguments)[0]
