"""Decoupled Knowledge Distillation (arXiv 2203.08679) in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kd.reference import forward_kl, relative_entropy


def dkd(student: Tensor, teacher: Tensor, target: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """The two parts of KD, apart: target against the rest, and the rest among themselves.

    Args:
        student: ``(N, C)``.
        teacher: ``(N, C)``.
        target: ``(N,)`` class indices; a negative one names no class.
        temperature: Divides both networks' logits.
    Returns:
        TCKD and NCKD, each ``(N,)`` nats, without ``temperature**2``. Where the teacher excludes all but the
        target, there is nothing to learn about the rest: NCKD is 0.
    """
    student, teacher = ((logits / temperature).log_softmax(-1) for logits in (student, teacher))
    is_target = torch.arange(student.shape[-1], device=student.device) == target[:, None]
    # Finite, unlike -inf: where the target is the only class, its rest is one impossible class, not none.
    lowest = torch.finfo(student.dtype).min / 4
    student_rest, teacher_rest = (
        student.masked_fill(is_target, lowest),
        teacher.masked_fill(is_target, lowest),
    )

    def target_or_rest(log_probs: Tensor, rest: Tensor) -> Tensor:
        """Log-probabilities of the target and of all others together, however sure the row is."""
        target = torch.where(is_target, log_probs, 0).sum(-1)
        others = rest.logsumexp(-1)
        return torch.stack([target, others.masked_fill(others < lowest / 2, -torch.inf)], dim=-1)

    log_q = target_or_rest(student, student_rest)
    log_p = target_or_rest(teacher, teacher_rest)
    tckd = relative_entropy(log_p.exp(), log_p, log_q.exp(), log_q)
    nckd = forward_kl(student_rest, teacher_rest, temperature=1.0)
    return tckd, torch.where(log_p[:, 1] == -torch.inf, 0, nckd)
