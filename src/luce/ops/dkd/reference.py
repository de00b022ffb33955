"""Decoupled Knowledge Distillation (arXiv 2203.08679) in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kd.reference import forward_kl, relative_entropy


def _target_or_rest(log_probs: Tensor, is_target: Tensor, rest: Tensor) -> Tensor:
    """Log-probabilities of the target and of all others together, ``(N, 2)``, however sure the row is."""
    target = torch.where(is_target, log_probs, 0).sum(-1)
    return torch.stack([target, rest.logsumexp(-1)], dim=-1)


def dkd(student: Tensor, teacher: Tensor, target: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """The two parts of KD, apart: target against the rest, and the rest among themselves.

    Args:
        student: ``(N, C)``.
        teacher: ``(N, C)``.
        target: ``(N,)`` class indices; a negative one names no class.
        temperature: Divides both networks' logits.
    Returns:
        TCKD and NCKD, each ``(N,)`` nats, without ``temperature**2``.
    """
    student, teacher = ((logits / temperature).log_softmax(-1) for logits in (student, teacher))
    is_target = torch.arange(student.shape[-1], device=student.device) == target[:, None]
    # Finite, unlike -inf: where the target is the only class, its rest is one impossible class, not none.
    lowest = torch.finfo(student.dtype).min / 4
    student_rest, teacher_rest = (
        student.masked_fill(is_target, lowest),
        teacher.masked_fill(is_target, lowest),
    )

    log_q = _target_or_rest(student, is_target, student_rest)
    log_p = _target_or_rest(teacher, is_target, teacher_rest)
    tckd = relative_entropy(log_p.exp(), log_p, log_q)
    return tckd, forward_kl(student_rest, teacher_rest, temperature=1.0)
