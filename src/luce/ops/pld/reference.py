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


def pld(
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    *,
    teacher_temperature: float = 1.0,
    top_k: int | None = None,
    order: Tensor | None = None,
) -> Tensor:
    """One PLD value per row: label first, then the teacher's order, weighted by the teacher's probabilities.

    Args:
        student: ``(N, C)``, float32 or float64.
        teacher: ``(N, C)``, same dtype.
        target: ``(N,)`` class indices; negative where a row has no label.
        teacher_temperature: Softens the weights only.
        top_k: Number of places that count.
        order: `teacher_order` of the rows, if it is known already.
    Returns:
        ``(N,)``, in nats.
    """
    order = label_first(teacher_order(teacher) if order is None else order, target)
    alpha = (teacher / teacher_temperature).softmax(-1).gather(-1, order)
    return ranking_nll(student.gather(-1, order), alpha, top_k)
