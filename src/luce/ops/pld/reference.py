"""Plackett-Luce Distillation in plain PyTorch: the oracle, the baseline and the fallback.

Symbols are those of the paper (arXiv 2506.12542): a ranking ``order`` lists the classes from the first
place to the last, ``u`` are the student's logits in that order, and ``alpha`` are the weights of the places.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .._rows import as_matrix, named_classes, weighted_rows
from ..suffix_logsumexp.reference import suffix_logsumexp
from .options import PldOptions


def teacher_order(teacher: Tensor) -> Tensor:
    """Return the classes by falling teacher logit, the lower index first among equals; ``(N, C)``."""
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
    r"""Return a ranking's weighted negative log-likelihood: :math:`\sum_{k \le K} \alpha_k (\phi_k - u_k)`.

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
    # In float64 where the device has it: along a scan of C steps, roundings of float32 would add up.
    wide = u.dtype if u.device.type == "mps" else torch.float64
    u, alpha, narrow = u.to(wide), alpha[:, :places].to(wide), u.dtype
    finite = u.clamp(min=torch.finfo(narrow).min)  # else a suffix of excluded classes gives inf - inf
    tail = finite[:, places:].logsumexp(-1, keepdim=True)
    following = suffix_logsumexp(torch.cat([finite[:, 1:places], tail], dim=-1)).clamp(
        min=torch.finfo(wide).min
    )
    # phi_k - u_k as log(1 + Z_{k+1} / w_k): the difference cancels where a class outweighs all behind it.
    nll = -F.logsigmoid(u[:, :places] - following)
    nll = nll.masked_fill((alpha == 0) & (nll == torch.inf), 0)  # 0 * inf
    return (alpha * nll).sum(-1).to(narrow)


def tied_ranking_nll(u: Tensor, alpha: Tensor, tied: Tensor) -> Tensor:
    r"""Return `ranking_nll` with one sum for tied places (Efron's rule), so that their order does not matter.

    The *d* members of a group share :math:`Z = Z_{after} + E (d + 1) / (2 d)`, the mean over their places,
    where *E* is the sum of the group and :math:`Z_{after}` the sum of all places behind it.

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
    """Return how many first places leave less than `epsilon` of the weight, at least 1; ``(N, 1)``."""
    wide = alpha.dtype if alpha.device.type == "mps" else torch.float64
    # In float64: the float32 sum of thousands of places may differ from 1 by more than epsilon.
    left = 1 - alpha.to(wide).cumsum(-1)
    return ((left >= epsilon).sum(-1, keepdim=True) + 1).clamp(max=alpha.shape[-1])


def pld(
    student: Tensor, teacher: Tensor, target: Tensor, options: PldOptions, order: Tensor | None = None
) -> Tensor:
    """Return one PLD value per row: the label first, then the teacher's order, weighted by its probabilities.

    Args:
        student: ``(N, C)``, float32 or float64.
        teacher: ``(N, C)``, same dtype.
        target: ``(N,)`` class indices; negative where a row has no label.
        options: All but the tolerance apply: the reference sorts every class.
        order: `teacher_order` of the rows, if it is already known.
    Returns:
        ``(N,)``, in nats.
    """
    order = label_first(teacher_order(teacher) if order is None else order, target)
    alpha = (teacher / options.teacher_temperature).softmax(-1).gather(-1, order)
    u = student.gather(-1, order)
    if options.epsilon:
        k = torch.arange(alpha.shape[-1], device=alpha.device)
        alpha = alpha.masked_fill(k >= places_within(alpha, options.epsilon), 0)
    if not options.average_ties:
        return ranking_nll(u, alpha, options.top_k)
    ranked = teacher.gather(-1, order)
    tied = torch.zeros_like(order, dtype=torch.bool)
    tied[:, 1:] = ranked[:, 1:] == ranked[:, :-1]
    tied[:, 1:2] &= (target < 0)[:, None]  # the label went first and shares its place with no class
    return tied_ranking_nll(u, alpha, tied)


def given_ranking(order: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return a caller's order as a ranking, and which rows of it are none, ``(rows,)``.

    Args:
        order: ``(N, C)`` or ``(N, C, M)``.
        weight: ``(N,)`` or ``(N, M)``; rows of weight 0 may hold anything.
    """
    given = as_matrix(order).long()
    classes = torch.arange(given.shape[-1], device=given.device).expand_as(given)
    wrong = (given.sort(-1).values != classes).any(-1)
    ranking = torch.where(wrong[:, None], classes, given)
    return ranking, wrong if weight is None else wrong & (weight.reshape(-1) != 0)


def pld_rows(
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None,
    weight: Tensor | None,
    order: Tensor | None,
    options: PldOptions,
) -> Tensor:
    """`pld` of blocks with weights.

    NaN in rows whose label names no class or one that both networks exclude, where the student excludes every
    class, where a logit is +inf, and where the given order is no ranking.
    """

    def formula(s: Tensor, t: Tensor) -> Tensor:
        labels = target.reshape(-1) if target is not None else torch.full(s.shape[:1], -1, device=s.device)
        named, excluded = named_classes(labels, s, t)
        wrong = (labels < -1) | (labels >= s.shape[-1]) | ((labels >= 0) & excluded) | s.amax(-1).isinf()
        given = None
        if order is not None:
            given, unranked = given_ranking(order, weight)
            wrong |= unranked
        values = pld(s, t, torch.where(labels < 0, labels, named), options, given)
        return values.masked_fill(wrong, torch.nan)

    return weighted_rows(formula, student, teacher, weight)
