"""The operator in plain PyTorch: the reference, on the operators' layout and with weights."""

from __future__ import annotations

import torch
from torch import Tensor

from .._rows import weighted_rows
from . import reference


def dkd_rows(
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    weight: Tensor | None,
    temperature: float,
    alpha: float,
    beta: float,
) -> Tensor:
    """As the native engine: NaN in rows whose label names no class, or one that both networks exclude."""

    def formula(s: Tensor, t: Tensor) -> Tensor:
        labels = target.reshape(-1)
        named = labels.clamp(0, s.shape[-1] - 1)
        excluded = (torch.stack([s, t]).gather(-1, named.expand(2, -1)[..., None]) == -torch.inf).all(0)[:, 0]
        parts = reference.dkd(s, t, named, temperature)
        # A part that is switched off may be infinite, and is left out; a NaN is in both.
        values = sum(
            (w * v for w, v in zip((alpha, beta), parts, strict=True) if w), start=s.new_zeros(len(s))
        )
        return values.masked_fill((labels != named) | excluded, torch.nan)

    return weighted_rows(formula, student, teacher, weight)
