"""Decoupled Knowledge Distillation (arXiv 2203.08679) in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kd.reference import Pair, relative_entropy, softened


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
    teacher, student, difference = softened(student, teacher, temperature)
    is_target = torch.arange(student.shape[-1], device=student.device) == target[:, None]
    # Finite, unlike -inf: where the target is the only class, its rest is one impossible class, not none.
    lowest = torch.finfo(student.dtype).min / 4
    student_rest, teacher_rest = (
        student.masked_fill(is_target, lowest),
        teacher.masked_fill(is_target, lowest),
    )
    rest = Pair.of(teacher_rest, student_rest, difference)

    def target_or_rest(logits: Tensor, rest: Tensor) -> Tensor:
        """Logits of the target and of all others together, however sure the row is."""
        target = torch.where(is_target, logits, 0).sum(-1)
        others = rest.logsumexp(-1)
        return torch.stack([target, others.masked_fill(others < lowest / 2, -torch.inf)], dim=-1)

    first, second = target_or_rest(teacher, teacher_rest), target_or_rest(student, student_rest)
    between = torch.cat(
        [torch.where(is_target, difference, 0).sum(-1, keepdim=True), rest.normaliser], dim=-1
    )
    halves = Pair.of(first, second, torch.where(second == -torch.inf, torch.inf, between))
    tckd = relative_entropy(halves.p, halves.d, halves.change)
    nckd = relative_entropy(rest.p, rest.d, rest.change)
    return tckd, torch.where(first[:, 1] == -torch.inf, 0, nckd)
