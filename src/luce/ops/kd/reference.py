"""Divergences between rows of logits in plain PyTorch. ``p`` is the teacher, ``q`` the student."""

from __future__ import annotations

import torch
from torch import Tensor


def relative_entropy(p: Tensor, log_p: Tensor, q: Tensor, log_q: Tensor) -> Tensor:
    r"""Sum of :math:`p d`, :math:`d = \log p - \log q`, with ``0 (log 0 - x) = 0`` also in the gradient.

    Each term is taken as :math:`p (d + e^{-d} - 1) = p d + q - p`. In total nothing changes, as both
    distributions sum to 1, but now no term is negative: nothing cancels where the two are close.
    """
    d = torch.where(p == 0, 0, log_p - log_q)
    close = (d.abs() < 0.5) & (p > 0)
    small = torch.where(close, d, 0)
    return torch.where(close, p * (small + torch.expm1(-small)), p * d + (q - p)).sum(-1)


def forward_kl(student: Tensor, teacher: Tensor, temperature: float | Tensor) -> Tensor:
    """KL(teacher || student) at a temperature, without its square; ``(N, C)`` logits to ``(N,)`` nats.

    A tensor of ``(N, 1)`` gives each row a temperature of its own.
    """
    log_p = (teacher / temperature).log_softmax(-1)
    log_q = (student / temperature).log_softmax(-1)
    return relative_entropy(log_p.exp(), log_p, log_q.exp(), log_q)


def reverse_kl(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """KL(student || teacher) at a temperature; ``(N, C)`` logits to ``(N,)`` nats."""
    return forward_kl(teacher, student, temperature)


def jsd(student: Tensor, teacher: Tensor, beta: float, temperature: float) -> Tensor:
    """Generalized Jensen-Shannon divergence, the mixture holding ``beta`` of the teacher; ``(N,)`` nats."""
    log_p = (teacher / temperature).log_softmax(-1)
    log_q = (student / temperature).log_softmax(-1)
    p, q = log_p.exp(), log_q.exp()
    m = beta * p + (1 - beta) * q
    log_m = m.masked_fill(m == 0, 1).log()
    return beta * relative_entropy(p, log_p, m, log_m) + (1 - beta) * relative_entropy(q, log_q, m, log_m)
