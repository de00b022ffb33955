"""Decoupled knowledge distillation, one value per row, and its two parts."""

from __future__ import annotations

from torch import Tensor

from ..engines import choose
from . import cpu
from .plain import dkd_rows
from .reference import dkd

__all__ = ["dkd", "weighted_dkd"]


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
    """``alpha * tckd + beta * nckd`` of `dkd`; a part of weight 0 is left out, even if it is infinite.

    Args:
        student: ``(N, C)`` or ``(N, C, M)`` of any strides, float16, bfloat16, float32 or float64.
        teacher: Same shape, any of these dtypes; only the reference passes a gradient on to it.
        target: ``(N,)`` or ``(N, M)``, int64. A label outside [0, C), and one whose class both networks
            exclude, makes its row NaN.
        temperature: Divides both networks' logits.
        alpha: What the target against the rest counts.
        beta: What the rest among themselves counts.
        weight: What each row's value is multiplied by; rows of weight 0 are not looked at.
        backend: ``"auto"``, ``"cpu"``, ``"gpu"`` or ``"reference"``.
    Returns:
        ``(N,)`` or ``(N, M)``, in nats without ``temperature**2``, float32 or, if either network is, float64.
    Example:
        >>> import torch
        >>> student, teacher = torch.tensor([[0.5, -1.0, 2.0, 0.3]]), torch.tensor([[2.0, 1.0, 0.1, -1.0]])
        >>> weighted_dkd(student, teacher, torch.tensor([2]), 4.0, alpha=1.0, beta=8.0)
        tensor([0.4867])
    """
    engine = choose(backend, student, teacher, no_kernel=None)
    run = dkd_rows if engine == "reference" else cpu.dkd
    return run(student, teacher, target, weight, temperature, alpha, beta)
