"""Divergences between rows of logits in plain PyTorch. ``p`` is the teacher, ``q`` the student.

Between them stands ``d = log p - log q``. At a high temperature it is small, and so are ``q - p`` and the
divergence: two softmaxes taken apart leave no digits for them. So ``d`` is taken from the difference of the
logits, and all else from ``d``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .._rows import weighted_rows

Kind = Literal["forward_kl", "reverse_kl", "jsd", "limit"]
KINDS: tuple[Kind, ...] = ("forward_kl", "reverse_kl", "jsd", "limit")
"""Numbered as in csrc/divergence.h."""


@dataclass(frozen=True)
class Pair:
    """Two distributions over the same classes, ``(N, C)``, and what lies between them.

    Attributes:
        p: The first.
        q: The second.
        d: ``log p - log q``, 0 where p is 0.
        change: ``q - p``.
        normaliser: ``(N, 1)``, by how much the logarithm of the first's sum of exponentials is larger.
    """

    p: Tensor
    q: Tensor
    d: Tensor
    change: Tensor
    normaliser: Tensor

    @classmethod
    def of(cls, first: Tensor, second: Tensor, difference: Tensor) -> Pair:
        """The softmaxes of rows of logits whose difference is known better than they tell it themselves."""
        p, q = first.softmax(-1), second.softmax(-1)
        normaliser = first.logsumexp(-1, keepdim=True) - second.logsumexp(-1, keepdim=True)
        better = _normaliser(normaliser.detach(), p.detach(), q.detach(), difference.detach())
        # The better value; the derivatives, of any order, of the other.
        normaliser = better + (normaliser - normaliser.detach())
        d = torch.where(p == 0, 0, difference - normaliser)
        return cls(p, q, d, _change(p, q, d), normaliser)


def _normaliser(rough: Tensor, p: Tensor, q: Tensor, difference: Tensor) -> Tensor:
    """The difference of the normalisers to the last digit of the differences of the logits.

    What logarithms of sums leave out of it, the sum of q - p tells, which should be 0.
    """
    return rough - _change(p, q, difference - rough).sum(-1, keepdim=True).log1p()


def _close(p: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """Where ``d = log p - log q`` is at most 1, and d there, 0 elsewhere."""
    close = (d.abs() <= 1) & (p > 0)
    return close, torch.where(close, d, 0)


def _change(p: Tensor, q: Tensor, d: Tensor) -> Tensor:
    """``q - p``, from ``d = log p - log q`` where that is small."""
    close, small = _close(p, d)
    return torch.where(close, p * torch.expm1(-small), q - p)


def _excess(d: Tensor) -> Tensor:
    """``d + exp(-d) - 1`` for ``|d| <= 1``: its series, for the sum itself would leave no digits.

    The series gives the value alone, for its derivative would need memory for each term. Derivatives, of any
    order, come from a step of 0:
    ``excess(d + step) = excess(d) + (1 - exp(-d)) step + exp(-d) excess(step)``.
    """
    here = d.detach()
    # Two of them: the derivative of excess(step) is 1 - 1, and exactly 0 only if nothing else is added to it.
    step, other_step = d - here, d - here
    terms = 18 if d.dtype == torch.float64 else 10
    series = torch.full_like(here, 1 / math.factorial(terms))
    for k in range(terms - 1, 1, -1):
        series = 1 / math.factorial(k) - here * series
    fall = torch.expm1(-here)
    return here.square() * series + ((1 + fall) * (step + torch.expm1(-step)) - fall * other_step)


def relative_entropy(p: Tensor, d: Tensor, change: Tensor) -> Tensor:
    r"""Sum of :math:`p d`, where :math:`d = \log p - \log q`, finite where p is 0, and ``change`` is q - p.

    Each term is taken as :math:`p (d + e^{-d} - 1) = p d + q - p`. In total nothing changes, as both
    distributions sum to 1, but now no term is negative: nothing cancels where the two are close.
    """
    close, small = _close(p, d)
    return torch.where(close, p * _excess(small), p * d + change).sum(-1)


def softened(student: Tensor, teacher: Tensor, temperature: float | Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Teacher's and student's logits over the temperature, up to a constant a row, and their difference."""
    # A common offset shall take no digits.
    student, teacher = (x - x.detach().amax(-1, keepdim=True) for x in (student, teacher))
    return teacher / temperature, student / temperature, (teacher - student) / temperature


def forward_kl(student: Tensor, teacher: Tensor, temperature: float | Tensor) -> Tensor:
    """KL(teacher || student) at a temperature, without its square; ``(N, C)`` logits to ``(N,)`` nats.

    A tensor of ``(N, 1)`` gives each row a temperature of its own.
    """
    pair = Pair.of(*softened(student, teacher, temperature))
    return relative_entropy(pair.p, pair.d, pair.change)


def reverse_kl(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """KL(student || teacher) at a temperature; ``(N, C)`` logits to ``(N,)`` nats."""
    return forward_kl(teacher, student, temperature)


def jsd(student: Tensor, teacher: Tensor, beta: float, temperature: float) -> Tensor:
    """Generalized Jensen-Shannon divergence, the mixture holding ``beta`` of the teacher; ``(N,)`` nats."""
    pair = Pair.of(*softened(student, teacher, temperature))
    m = beta * pair.p + (1 - beta) * pair.q
    # The gradient divides by m twice, which must not overflow: smaller classes contribute 0.
    smallest = torch.finfo(m.dtype).tiny / torch.finfo(m.dtype).eps
    m = torch.where(m < smallest, 1, m)

    def to_mixture(p: Tensor, change: Tensor) -> Tensor:
        p, relative = torch.where(p < smallest, 0, p), change / m
        close = relative.abs() < 0.5
        far = torch.where(close | (p == 0), 1, p / m)
        d = torch.where(close, torch.log1p(-torch.where(close, relative, 0)), far.log())
        return relative_entropy(p, d, change)

    of_teacher = to_mixture(pair.p, (1 - beta) * pair.change)
    of_student = to_mixture(pair.q, -beta * pair.change)
    return beta * of_teacher + (1 - beta) * of_student


def kl_limit(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the limit of T^2 times either KL as the temperature T grows; ``(N, C)`` logits to ``(N,)``.

    Half the variance of the logits' differences, over the classes that both networks have.
    """
    of_student, of_teacher = student != -torch.inf, teacher != -torch.inf
    shared = of_student & of_teacher
    count = shared.sum(-1, keepdim=True).clamp(min=1)
    difference = torch.where(shared, student, 0) - torch.where(shared, teacher, 0)
    deviation = torch.where(shared, difference - difference.sum(-1, keepdim=True) / count, 0)
    values = deviation.square().sum(-1) / (2 * count[:, 0])
    # A class that one network alone excludes leaves a divergence at every T: T^2 times it is infinite. A
    # network that excludes all has no distribution.
    values = values + torch.where((of_student != of_teacher).any(-1), torch.inf, 0)
    return values + torch.where(of_student.any(-1) & of_teacher.any(-1), 0, torch.nan)


def divergence_rows(
    student: Tensor, teacher: Tensor, weight: Tensor | None, kind: int, temperature: float, beta: float
) -> Tensor:
    """One of `KINDS`, of blocks with weights; `beta` is for ``"jsd"``, `temperature` not for ``"limit"``."""

    def formula(s: Tensor, t: Tensor) -> Tensor:
        if KINDS[kind] == "limit":
            return kl_limit(s, t)
        if KINDS[kind] == "jsd":
            return jsd(s, t, beta, temperature)
        return (forward_kl if KINDS[kind] == "forward_kl" else reverse_kl)(s, t, temperature)

    return weighted_rows(formula, student, teacher, weight)
