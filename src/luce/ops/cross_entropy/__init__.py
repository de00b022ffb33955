"""Cross-entropy with the labels, one value per row."""

from __future__ import annotations

from torch import Tensor

from ..engines import choose
from . import cpu
from .plain import cross_entropy_rows

__all__ = ["cross_entropy"]


def cross_entropy(
    student: Tensor,
    target: Tensor,
    *,
    label_smoothing: float = 0.0,
    weight: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Minus the label's log-probability, or a share of it with the mean over the classes that exist.

    Args:
        student: ``(N, C)`` or ``(N, C, M)`` of any strides, float16, bfloat16, float32 or float64; a class at
            ``-inf`` does not exist.
        target: ``(N,)`` or ``(N, M)``, int64; a label outside [0, C) makes its row NaN.
        label_smoothing: Probability spread evenly over the classes that exist, in [0, 1).
        weight: What each row's value is multiplied by; rows of weight 0 are not looked at.
        backend: ``"auto"``, ``"cpu"``, ``"gpu"`` or ``"reference"``.
    Returns:
        ``(N,)`` or ``(N, M)``, in nats, float32 or, if the student is, float64.
    Example:
        >>> import torch
        >>> cross_entropy(torch.tensor([[0.5, -1.0, 2.0, 0.3]]), torch.tensor([2]))
        tensor([0.3754])
    """
    engine = choose(backend, student, no_kernel=None)
    run = cross_entropy_rows if engine == "reference" else cpu.cross_entropy
    return run(student, target, weight, label_smoothing)
