"""Losses that regress the teacher's logits."""

from __future__ import annotations

from torch import Tensor

from ...ops.kd.reference import kl_limit
from .._reduce import Reduction, Rows

__all__ = ["logit_matching_loss"]


def logit_matching_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor | None = None,
    *,
    center: bool = False,
    ignore_index: int = -100,
    class_dim: int = 1,
    row_weight: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Mean squared difference of the logits, over the classes of a row.

    .. math:: \frac{1}{C} \sum_i (s_i - t_i)^2

    Unlike KD, this loss depends on a common offset of a network's logits. `center` subtracts each network's
    mean over the classes first, :math:`s_i - \bar s` against :math:`t_i - \bar t`; KD tends to half of that
    as its temperature grows. Centring lowers the value by :math:`(\bar s - \bar t)^2` and removes the part of
    the gradient that would make the means equal.

    Args:
        student_logits: Shape ``(N, C)``, ``(N, C, ...)`` or, with ``class_dim=-1``, ``(..., C)``.
        teacher_logits: Same shape; receives no gradient.
        target: Class indices, used only to drop rows labelled `ignore_index`.
        center: Subtract each row's mean over the classes.
        ignore_index: Rows with this label do not count.
        class_dim: Dimension of the classes.
        row_weight: One weight per row, at least 0; the mean divides by their sum.
        reduction: ``"none"``, ``"mean"`` per kept row, or ``"sum"``.
    Returns:
        Squared logits per class. A class at ``-inf`` in both networks does not exist and does not count; at
        ``-inf`` in one alone it makes the loss ``+inf``.
    Raises:
        ValueError: On a wrong shape or value.
        TypeError: On a wrong dtype.
    Example:
        >>> import torch
        >>> logit_matching_loss(torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 4.0]]))  # (1 + 4) / 2
        tensor(2.5000)
        >>> logit_matching_loss(torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 4.0]]), center=True)  # 1.5^2
        tensor(2.2500)

    References:
        Ba and Caruana, Do Deep Nets Really Need to be Deep?, arXiv 1312.6184; Kim et al., Comparing
        Kullback-Leibler Divergence and Mean Squared Error Loss in Knowledge Distillation, arXiv 2105.08919;
        on centring Chen et al., Exploring the Connection between Knowledge Distillation and Logits Matching,
        arXiv 2109.06458.
    """
    rows = Rows.of(
        student_logits, teacher_logits, target, row_weight, class_dim=class_dim, ignore_index=ignore_index
    )
    if center:
        return rows.reduce(2 * kl_limit(rows.student, rows.teacher), reduction)
    present = rows.present()
    difference = rows.student.masked_fill(~present, 0) - rows.teacher.masked_fill(~present, 0)
    return rows.reduce(difference.square().sum(-1) / present.sum(-1), reduction)
