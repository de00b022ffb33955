"""Cross-entropy in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def cross_entropy(student: Tensor, target: Tensor, label_smoothing: float) -> Tensor:
    """Minus the label's log-probability, or a share of it with the mean over the classes that exist.

    Args:
        student: ``(N, C)``; a class at ``-inf`` does not exist.
        target: ``(N,)`` class indices.
        label_smoothing: Probability spread evenly, in [0, 1).
    Returns:
        ``(N,)``, in nats.
    """
    nll = -student.log_softmax(-1)
    values = nll.gather(-1, target[:, None])[:, 0]
    if not label_smoothing:
        return values
    exists = student != -torch.inf
    evenly = torch.where(exists, nll, 0).sum(-1) / exists.sum(-1)
    return (1 - label_smoothing) * values + label_smoothing * evenly
