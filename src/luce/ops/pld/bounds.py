"""Error bound of a truncated PLD."""

from __future__ import annotations

import torch
from torch import Tensor

from .._rows import as_matrix, wide_dtype
from .options import PldOptions
from .reference import given_ranking, label_first, places_within, teacher_order


def truncation_bound(
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None,
    weight: Tensor | None,
    order: Tensor | None,
    options: PldOptions,
) -> Tensor:
    r"""Return how far the loss of the first *K* places can be from that of all places.

    Let the classes outside have the teacher's probability :math:`\epsilon` and student logits of range *R*.
    The full loss is then larger by at most :math:`\epsilon (\log(C - K) + R)`, and the gradients differ by at
    most :math:`2 \epsilon` in the L1 norm.

    Args:
        student: ``(N, C)`` or ``(N, C, M)``.
        teacher: Same shape.
        target: ``(N,)`` or ``(N, M)``, or None.
        weight: Same shape, or None.
        order: The teacher's order in the layout of its logits, if it is already known.
        options: With `top_k`, `epsilon` or both.
    Returns:
        ``(rows, 2)``: the bounds of loss and gradient.
    """
    dtype = wide_dtype(student, teacher)
    s, t = as_matrix(student).to(dtype), as_matrix(teacher).to(dtype)
    labels = torch.full(s.shape[:1], -1, device=s.device) if target is None else target.reshape(-1)
    order = label_first(teacher_order(t) if order is None else given_ranking(order, weight)[0], labels)
    alpha = (t / options.teacher_temperature).softmax(-1).gather(-1, order)
    places = torch.full_like(labels[:, None], min(options.top_k, s.shape[-1]))
    if options.epsilon:
        places = torch.minimum(places, places_within(alpha, options.epsilon))
    outside = torch.arange(s.shape[-1], device=s.device) >= places
    left = torch.where(outside, alpha, 0).sum(-1)
    u = s.gather(-1, order)
    # A class that the teacher excludes has no term of its own. It only enlarges the sums of others, so it
    # counts for the highest logit but not for the lowest.
    highest = u.masked_fill(~outside, -torch.inf).amax(-1)
    lowest = u.masked_fill(~outside | (alpha == 0), torch.inf).amin(-1)
    spread = (highest - lowest).clamp(min=0)
    of_loss = torch.where(left == 0, 0, left * (outside.sum(-1).clamp(min=1).log() + spread))
    bound = torch.stack([of_loss, 2 * left], dim=-1)
    if weight is None:
        return bound
    size = weight.reshape(-1, 1).abs()
    return torch.where(size == 0, 0, bound * size)
