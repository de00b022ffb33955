"""Decoupled Knowledge Distillation (arXiv 2203.08679) in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from .._rows import named_classes, weighted_rows
from ..kd.reference import Pair, relative_entropy, softened


def dkd(student: Tensor, teacher: Tensor, target: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Return the two parts of KD: the target against the rest, and the rest among themselves.

    Args:
        student: ``(N, C)``.
        teacher: ``(N, C)``.
        target: ``(N,)`` class indices; a negative one names no class.
        temperature: Divides both networks' logits.
    Returns:
        TCKD and NCKD, each ``(N,)`` nats, without ``temperature**2``. NCKD is 0 where the teacher excludes
        all classes but the target.
    """
    teacher, student, difference = softened(student, teacher, temperature)
    is_target = torch.arange(student.shape[-1], device=student.device) == target[:, None]
    # Finite, unlike -inf: a rest without classes still has a softmax, where -inf everywhere would give NaN.
    lowest = torch.finfo(student.dtype).min / 4
    student_rest, teacher_rest = (
        student.masked_fill(is_target, lowest),
        teacher.masked_fill(is_target, lowest),
    )
    rest = Pair.of(teacher_rest, student_rest, difference)

    def target_or_rest(logits: Tensor, rest: Tensor) -> Tensor:
        """Return the logits of the target and of all others together.

        From the logits, not from probabilities: a target of probability 1 - 1e-9 has a rest all the same.
        """
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


def dkd_rows(
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    weight: Tensor | None,
    temperature: float,
    alpha: float,
    beta: float,
) -> Tensor:
    """``alpha * tckd + beta * nckd`` of `dkd`, of blocks with weights.

    NaN in rows whose label names no class, or one that both networks exclude.
    """

    def formula(s: Tensor, t: Tensor) -> Tensor:
        labels = target.reshape(-1)
        named, excluded = named_classes(labels, s, t)
        parts = dkd(s, t, named, temperature)
        # A part of weight 0 may be infinite, and 0 times it NaN; a NaN of the row is in both parts.
        values = sum(
            (w * v for w, v in zip((alpha, beta), parts, strict=True) if w), start=s.new_zeros(len(s))
        )
        return values.masked_fill((labels != named) | excluded, torch.nan)

    return weighted_rows(formula, student, teacher, weight)
