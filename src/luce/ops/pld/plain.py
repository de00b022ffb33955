"""The operator in plain PyTorch: the reference, on the operators' layout and with weights."""

from __future__ import annotations

import torch
from torch import Tensor

from .._rows import as_matrix, weighted_rows
from . import reference
from .options import PldOptions


def pld_rows(
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None,
    weight: Tensor | None,
    order: Tensor | None,
    options: PldOptions,
) -> Tensor:
    """As the native engine, by sorting every class: `options.tolerance` is not needed.

    NaN in rows whose label names no class or one that both networks exclude, where the student excludes every
    class, and where a logit is +inf.
    """

    def formula(s: Tensor, t: Tensor) -> Tensor:
        labels = target.reshape(-1) if target is not None else torch.full(s.shape[:1], -1, device=s.device)
        named = labels.clamp(0, s.shape[-1] - 1)
        excluded = (torch.stack([s, t]).gather(-1, named.expand(2, -1)[..., None]) == -torch.inf).all(0)[:, 0]
        wrong = (labels < -1) | (labels >= s.shape[-1]) | ((labels >= 0) & excluded) | s.amax(-1).isinf()
        values = reference.pld(
            s,
            t,
            torch.where(labels < 0, labels, named),
            teacher_temperature=options.teacher_temperature,
            top_k=options.top_k,
            epsilon=options.epsilon,
            average_ties=options.ties == "average",
            order=None if order is None else as_matrix(order).long(),
        )
        return values.masked_fill(wrong, torch.nan)

    return weighted_rows(formula, student, teacher, weight)
