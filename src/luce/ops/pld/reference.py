"""Plackett-Luce Distillation in plain PyTorch: the oracle, the baseline and the fallback.

Symbols are those of the paper (arXiv 2506.12542): a ranking ``order`` lists the classes from the first
place to the last, ``u`` are the student's logits in that order and ``alpha`` the weights of the places.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..suffix_logsumexp.reference import suffix_logsumexp


def teacher_order(teacher: Tensor) -> Tensor:
    """Classes by falling teacher logit, the lower index first among equals; ``(N, C)`` indices."""
    return teacher.sort(dim=-1, descending=True, stable=True).indices


def label_first(order: Tensor, target: Tensor) -> Tensor:
    """Move each row's label to the first place; rows with a negative label keep their order.

    Args:
        order: ``(N, C)``, each row a permutation of the classes.
        target: ``(N,)`` class indices.
    Example:
        >>> label_first(torch.tensor([[3, 1, 0, 2], [3, 1, 0, 2]]), torch.tensor([0, -1]))
        tensor([[0, 3, 1, 2],
                [3, 1, 0, 2]])
    """
    target = torch.where(target < 0, order[:, 0], target)
    place = (order == target[:, None]).long().argmax(-1, keepdim=True)
    k = torch.arange(order.shape[-1], device=order.device)
    source = torch.where(k == 0, place, torch.where(k <= place, k - 1, k))
    return order.gather(-1, source)


def ranking_nll(u: Tensor, alpha: Tensor, top_k: int | None = None) -> Tensor:
    r"""Weighted negative log-likelihood of a ranking: :math:`\sum_{k \le K} \alpha_k (\phi_k - u_k)`.

    :math:`\phi_k - u_k` is minus the log-probability that the class in place *k* is chosen among those
    in places *k* to *C*. Truncation drops terms, never classes: every suffix keeps its unordered tail.

    Args:
        u: Student logits in ranking order, ``(N, C)``. A class at ``-inf`` costs ``+inf`` unless its
            weight is 0.
        alpha: Weights of the places, ``(N, C)``.
        top_k: Number of places *K* that count; None for all.
    Returns:
        ``(N,)``, in nats.
    """
    classes = u.shape[-1]
    places = classes if top_k is None else min(top_k, classes)
    # In float64 where there is one: float32 cannot hold how far suffixes differ, and a scan sums up errors.
    wide = u.dtype if u.device.type == "mps" else torch.float64
    u, alpha, narrow = u.to(wide), alpha[:, :places].to(wide), u.dtype
    finite = u.clamp(min=torch.finfo(narrow).min)  # a suffix of excluded classes must not give inf - inf
    tail = finite[:, places:].logsumexp(-1, keepdim=True)
    following = suffix_logsumexp(torch.cat([finite[:, 1:places], tail], dim=-1)).clamp(
        min=torch.finfo(wide).min
    )
    # phi_k - u_k as log(1 + Z_{k+1} / w_k): nothing cancels where one class outweighs all that follow.
    nll = -F.logsigmoid(u[:, :places] - following)
    nll = nll.masked_fill((alpha == 0) & (nll == torch.inf), 0)  # 0 * inf: an excluded class nobody asks for
    return (alpha * nll).sum(-1).to(narrow)


def tied_ranking_nll(u: Tensor, alpha: Tensor, tied: Tensor) -> Tensor:
    r"""As `ranking_nll`, tied places sharing one sum (Efron's rule), so that their order does not matter.

    The members of a group of *d* all see :math:`Z = Z_{after} + E (d + 1) / (2 d)`, the mean over their
    places, where *E* is the group's own sum and :math:`Z_{after}` that of all places behind it.

    Args:
        u: Student logits in ranking order, ``(N, C)``.
        alpha: Weights of the places, ``(N, C)``.
        tied: ``(N, C)``, True where a place is tied with the one before it.
    Returns:
        ``(N,)``, in nats.
    """
    narrow, wide = u.dtype, u.dtype if u.device.type == "mps" else torch.float64
    u, alpha = u.to(wide), alpha.to(wide)
    lowest = torch.finfo(narrow).min
    phi = suffix_logsumexp(u.clamp(min=lowest)).clamp(min=lowest)
    k = torch.arange(u.shape[-1], device=u.device).expand_as(tied)
    start = torch.where(tied, 0, k).cummax(-1).values
    last_of_group = ~torch.cat([tied[:, 1:], torch.zeros_like(tied[:, :1])], dim=-1)
    end = torch.where(last_of_group, k, u.shape[-1]).flip(-1).cummin(-1).values.flip(-1)
    members = (end - start + 1).to(wide)
    share = (members + 1) / (2 * members)
    behind = torch.cat([phi[:, 1:], torch.full_like(phi[:, :1], lowest)], dim=-1)
    z = phi.gather(-1, start)
    log_z = z + ((1 - share) * (behind.gather(-1, end) - z).expm1()).log1p()
    nll = log_z - u
    nll = nll.masked_fill((alpha == 0) & (nll == torch.inf), 0)
    return (alpha * nll).sum(-1).to(narrow)


def places_within(alpha: Tensor, epsilon: float) -> Tensor:
    """How many first places leave less than `epsilon` of the weight; 1 at least. ``(N, C)`` to ``(N, 1)``."""
    wide = alpha.dtype if alpha.device.type == "mps" else torch.float64
    left = 1 - alpha.to(wide).cumsum(-1)
    return ((left >= epsilon).sum(-1, keepdim=True) + 1).clamp(max=alpha.shape[-1])


def pld(
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    *,
    teacher_temperature: float = 1.0,
    top_k: int | None = None,
    epsilon: float | None = None,
    average_ties: bool = False,
    order: Tensor | None = None,
) -> Tensor:
    """One PLD value per row: label first, then the teacher's order, weighted by the teacher's probabilities.

    Args:
        student: ``(N, C)``, float32 or float64.
        teacher: ``(N, C)``, same dtype.
        target: ``(N,)`` class indices; negative where a row has no label.
        teacher_temperature: Softens the weights only.
        top_k: Number of places that count.
        epsilon: Count only as many places as leave less than this of the teacher's probability.
        average_ties: Classes with equal teacher logits, the label apart, share their places.
        order: `teacher_order` of the rows, if it is known already.
    Returns:
        ``(N,)``, in nats.
    """
    order = label_first(teacher_order(teacher) if order is None else order, target)
    alpha = (teacher / teacher_temperature).softmax(-1).gather(-1, order)
    u = student.gather(-1, order)
    if epsilon is not None:
        k = torch.arange(alpha.shape[-1], device=alpha.device)
        alpha = alpha.masked_fill(k >= places_within(alpha, epsilon), 0)
    if not average_ties:
        return ranking_nll(u, alpha, top_k)
    ranked = teacher.gather(-1, order)
    tied = torch.zeros_like(order, dtype=torch.bool)
    tied[:, 1:] = ranked[:, 1:] == ranked[:, :-1]
    tied[:, 1:2] &= (target < 0)[:, None]  # the label went first: it shares its place with no one
    return tied_ranking_nll(u, alpha, tied)
