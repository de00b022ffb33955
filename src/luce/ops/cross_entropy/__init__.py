"""Cross-entropy with the labels, one value per row."""

from __future__ import annotations

from torch import Tensor

from ..engines import choose
from ..fused import declare, fused
from .reference import cross_entropy_rows

__all__ = ["cross_entropy"]

declare("cross_entropy", cross_entropy_rows, triton="luce.ops.cross_entropy.triton")


def cross_entropy(
    student: Tensor,
    target: Tensor,
    *,
    label_smoothing: float = 0.0,
    weight: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Mix the label's negative log-probability with the mean over the classes that exist.

    Args:
        student: ``(N, C)`` or ``(N, C, M)`` of any strides, float16, bfloat16, float32 or float64; a class at
            ``-inf`` does not exist.
        target: ``(N,)`` or ``(N, M)``, int64; a label outside [0, C) makes its row NaN.
        label_smoothing: Probability spread evenly over the classes that exist, in [0, 1).
        weight: Multiplies each row's value; rows of weight 0 are skipped, whatever they contain.
        backend: ``"auto"``, ``"cpu"``, ``"gpu"`` or ``"reference"``.
    Returns:
        ``(N,)`` or ``(N, M)``, in nats, float32 or, if the student is, float64.
    Example:
        >>> import torch
        >>> cross_entropy(torch.tensor([[0.5, -1.0, 2.0, 0.3]]), torch.tensor([2]))
        tensor([0.3754])
    """
    target, weight = target.contiguous(), None if weight is None else weight.contiguous()
    if choose(backend, student, no_kernel=None) == "reference":
        return cross_entropy_rows(student, target, weight, label_smoothing)
    return fused("cross_entropy", student, target, weight, label_smoothing)[0]
