"""Divergences between rows of logits in plain PyTorch. ``p`` is the teacher, ``q`` the student."""

from __future__ import annotations

import torch
from torch import Tensor


def relative_entropy(p: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
    """Sum of ``p (log p - log q)``, with ``0 (log 0 - x) = 0`` for any x, also in the gradient."""
    return (p * torch.where(p == 0, 0, log_p - log_q)).sum(-1)


def forward_kl(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """KL(teacher || student) at a temperature, without its square; ``(N, C)`` logits to ``(N,)`` nats."""
    log_p = (teacher / temperature).log_softmax(-1)
    log_q = (student / temperature).log_softmax(-1)
    return relative_entropy(log_p.exp(), log_p, log_q)


def reverse_kl(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """KL(student || teacher) at a temperature; ``(N, C)`` logits to ``(N,)`` nats."""
    log_p = (teacher / temperature).log_softmax(-1)
    log_q = (student / temperature).log_softmax(-1)
    return relative_entropy(log_q.exp(), log_q, log_p)


def jsd(student: Tensor, teacher: Tensor, beta: float, temperature: float) -> Tensor:
    """Generalized Jensen-Shannon divergence, the mixture holding ``beta`` of the teacher; ``(N,)`` nats."""
    log_p = (teacher / temperature).log_softmax(-1)
    log_q = (student / temperature).log_softmax(-1)
    p, q = log_p.exp(), log_q.exp()
    mixture = beta * p + (1 - beta) * q
    log_m = mixture.masked_fill(mixture == 0, 1).log()
    return beta * relative_entropy(p, log_p, log_m) + (1 - beta) * relative_entropy(q, log_q, log_m)
