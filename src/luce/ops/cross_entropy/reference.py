"""Cross-entropy in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from .._rows import weighted_rows


def cross_entropy(student: Tensor, target: Tensor, label_smoothing: float) -> Tensor:
    """Mix the label's negative log-probability with the mean over the classes that exist.

    Args:
        student: ``(N, C)``; a class at ``-inf`` does not exist.
        target: ``(N,)`` class indices.
        label_smoothing: Probability spread evenly over the classes that exist, in [0, 1).
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


def cross_entropy_rows(
    student: Tensor, target: Tensor, weight: Tensor | None, label_smoothing: float
) -> Tensor:
    """`cross_entropy` of blocks with weights; NaN in rows whose label names no class."""

    def formula(s: Tensor, _: Tensor) -> Tensor:
        labels = target.reshape(-1)
        named = labels.clamp(0, s.shape[-1] - 1)
        return cross_entropy(s, named, label_smoothing).masked_fill(labels != named, torch.nan)

    return weighted_rows(formula, student, student.detach(), weight)
