"""The operator in plain PyTorch: the reference, on the operators' layout and with weights."""

from __future__ import annotations

import torch
from torch import Tensor

from .._rows import weighted_rows
from . import reference


def cross_entropy_rows(
    student: Tensor, target: Tensor, weight: Tensor | None, label_smoothing: float
) -> Tensor:
    """As the native engine: NaN in rows whose label names no class."""

    def formula(s: Tensor, _: Tensor) -> Tensor:
        labels = target.reshape(-1)
        named = labels.clamp(0, s.shape[-1] - 1)
        return reference.cross_entropy(s, named, label_smoothing).masked_fill(labels != named, torch.nan)

    return weighted_rows(formula, student, student.detach(), weight)
