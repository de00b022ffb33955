"""Losses on standardized logits: each row in units of its own spread."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import checks
from ...labels import UNLABELLED
from ...ops._rows import wide_dtype
from ...ops.dkd.reference import dkd
from ...ops.kd.reference import forward_kl
from .._reduce import Reduction, Rows

__all__ = ["normdkd_loss", "normkd_loss"]


def _spread(logits: Tensor, dim: int, unbiased: bool) -> tuple[Tensor, Tensor]:
    """Return the z-scores of logits along `dim`, and their standard deviation.

    A row with a NaN or +inf is NaN and passes no gradient, so that it may still be ignored afterwards.
    """
    possible = logits != -torch.inf
    # The row is first mapped to [-1, 0], so that neither a common offset costs digits nor a square overflows.
    # Offset and factor cancel in the result and need no gradient.
    gap = (logits - logits.detach().amax(dim, keepdim=True)).masked_fill(~possible, 0)
    # Excluded classes are 0 in `gap`, its maximum, and therefore never set the unit.
    unit = -gap.detach().amin(dim, keepdim=True)
    # Any NaN or +inf in a row makes its unit NaN or infinite: inf - inf is NaN, and amin keeps NaN.
    broken = ~unit.isfinite()
    constant = (unit == 0) | broken
    # Masked before the division: a NaN that is masked after it would still be NaN in the gradient.
    x = gap.masked_fill(broken, 0) / unit.masked_fill(constant, 1)

    count = possible.sum(dim, keepdim=True)
    x = (x - x.sum(dim, keepdim=True) / count.clamp(min=1)).masked_fill(~possible, 0)
    # A row of one class would divide by C - 1 = 0.
    variance = x.square().sum(dim, keepdim=True) / (count - int(unbiased)).clamp(min=1)
    deviation = variance.masked_fill(constant, 1).sqrt()  # the slope of a root is infinite at 0
    z = (x / deviation).masked_fill(constant, 0).masked_fill(~possible, -torch.inf)
    deviation = (unit * deviation).masked_fill(constant, 0)
    return z.masked_fill(broken, torch.nan), deviation.masked_fill(broken, torch.nan)


def standardize(logits: Tensor, *, class_dim: int = 1, unbiased: bool = True) -> Tensor:
    r"""Return z-scores: each row's logits minus their mean, divided by their standard deviation.

    .. math:: z_i = \frac{x_i - \bar x}{\sigma(x)}

    A loss on the standardized logits of both networks, `luce.Standardized`, does not depend on the mean or
    the spread of a row and cannot change those of the student. With `luce.kd_loss` this is logit
    standardization; its authors take a temperature of 2.

    Args:
        logits: Of one network, shape ``(N, C)``, ``(N, C, ...)`` or, with ``class_dim=-1``, ``(..., C)``. A
            class at ``-inf`` stays there and counts neither in the mean nor in the deviation. One masked by
            a large negative number counts like any other and dominates the deviation.
        class_dim: Dimension of the classes.
        unbiased: Divide the squares by C - 1, as the authors' code does, instead of C.
    Returns:
        Same shape, no unit, float32 for 16-bit logits; differentiable. No entry exceeds
        ``(C - 1) / sqrt(C)``, or ``sqrt(C - 1)`` if not `unbiased`. A row of equal logits is all zeros and
        has no gradient: near it the gradient grows as 1 / deviation, there being no constant beside the
        deviation (the authors add 1e-7).
    Raises:
        ValueError: On a wrong shape.
        TypeError: On a wrong dtype.
    Example:
        >>> standardize(torch.tensor([[1.0, 2.0, 3.0], [10.0, 20.0, 30.0], [7.0, 7.0, 7.0]]))
        tensor([[-1.,  0.,  1.],
                [-1.,  0.,  1.],
                [ 0.,  0.,  0.]])

    References:
        Sun et al., Logit Standardization in Knowledge Distillation, CVPR 2024, arXiv 2403.01427.
    """
    checks.check_logits("logits", logits)
    z, _ = _spread(logits.to(wide_dtype(logits)), checks.class_axis(logits, class_dim), unbiased)
    return z


def _standardized(rows: Rows, unbiased: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return both networks' z-scores and the teacher's variance, 0 where either row is constant."""
    student, student_deviation = _spread(rows.student, -1, unbiased)
    teacher, teacher_deviation = _spread(rows.teacher, -1, unbiased)
    variance = teacher_deviation.square().masked_fill(student_deviation == 0, 0)
    return student, teacher, variance[:, 0]


def normkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor | None = None,
    *,
    t_norm: float = 2.0,
    unbiased: bool = True,
    ignore_index: int = -100,
    class_dim: int = 1,
    row_weight: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""NormKD: KD with one temperature per row and network, proportional to the row's spread.

    .. math:: (\tau \sigma^t)^2 \sum_i p_i (\log p_i - \log q_i), \quad
        p = \mathrm{softmax}\Big(\frac{t}{\tau \sigma^t}\Big),
        \ q = \mathrm{softmax}\Big(\frac{s}{\tau \sigma^s}\Big)

    with :math:`\tau` the option `t_norm` and :math:`\sigma` a row's standard deviation over its classes. So
    it is KD of the standardized logits (`standardize`), each row weighted by the teacher's variance. The
    gradient passes through the student's deviation and therefore does not change the spread of its logits,
    which only the task's loss does. Rows of constant logits, in either network, have loss 0 and no
    gradient. As `t_norm` grows this tends to the teacher's variance, with the divisor C in it whatever
    `unbiased` says, times one minus the correlation of the two rows.

    The per-row weight, the unbiased deviation and its gradient are those of the authors' code; the code
    leaves constant rows undefined.

    Args:
        student_logits: Shape ``(N, C)``, ``(N, C, ...)`` or, with ``class_dim=-1``, ``(..., C)``.
        teacher_logits: Same shape; receives no gradient.
        target: Class indices, used only to drop rows labelled `ignore_index`.
        t_norm: Positive, no unit: the temperature in units of a row's standard deviation. The authors take 2
            on CIFAR-100, with weights 0.1 for cross-entropy and 0.9 for this, and 1 on ImageNet, with 0.5
            and 0.5.
        unbiased: Divide by C - 1 in the deviation, as the authors do, instead of C.
        ignore_index: Rows with this label do not count.
        class_dim: Dimension of the classes.
        row_weight: One weight per row, at least 0; the mean divides by their sum.
        reduction: ``"none"``, ``"mean"`` per kept row, or ``"sum"``.
    Returns:
        Nats times the squared temperature of the teacher's row: quadratic in the scale of the teacher's
        logits, independent of the student's. A class at ``-inf`` counts in neither deviation; in both
        networks it does not exist, in the student alone it makes the loss ``+inf``.
    Raises:
        ValueError: On a wrong shape or value.
        TypeError: On a wrong dtype.
    Example:
        >>> teacher_logits = torch.tensor([[4.0, 1.0, -2.0, 0.5]])
        >>> student_logits = torch.tensor([[1.5, 1.0, -1.0, 0.0]])
        >>> normkd_loss(student_logits, teacher_logits)
        tensor(0.3068)
        >>> normkd_loss(10 * student_logits, teacher_logits)
        tensor(0.3068)

    References:
        Chi et al., NormKD: Normalized Logits for Knowledge Distillation, arXiv 2308.00520.
    """
    checks.check_positive(t_norm=t_norm)
    rows = Rows.of(
        student_logits, teacher_logits, target, row_weight, class_dim=class_dim, ignore_index=ignore_index
    )
    student, teacher, variance = _standardized(rows, unbiased)
    # The divergence may be infinite in a constant row, and 0 * inf is NaN.
    values = torch.where(variance == 0, 0, variance * forward_kl(student, teacher, t_norm))
    return rows.reduce(t_norm**2 * values, reduction)


def normdkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 8.0,
    t_norm: float = 2.0,
    unbiased: bool = True,
    ignore_index: int = -100,
    unlabelled_index: int = UNLABELLED,
    class_dim: int = 1,
    row_weight: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""NormKD with DKD's two terms: one temperature per row, proportional to the row's spread.

    .. math:: (\tau \sigma^t)^2 \left[\alpha\,\mathrm{KL}\big((p_y, 1-p_y) \,\|\, (q_y, 1-q_y)\big)
        + \beta\,\mathrm{KL}(\hat p \,\|\, \hat q)\right]

    with p and q as in `normkd_loss`, of which this is the case ``alpha=1`` and, row by row,
    ``beta = 1 - p_y``. The label is left out of the second term exactly, where the authors' code subtracts
    1000 from its normalized logit. Constant rows have loss 0, as in `normkd_loss`.

    Args:
        student_logits: Shape ``(N, C)``, ``(N, C, ...)`` or, with ``class_dim=-1``, ``(..., C)``.
        teacher_logits: Same shape; receives no gradient.
        target: Class indices. Rows without a label do not count: they have no target class.
        alpha: Weight of the target term, at least 0. With `beta` it sums to 9 in all of the authors'
            CIFAR-100 settings, from 0.5 and 8.5 to 7 and 2; both are 1 on ImageNet.
        beta: Weight of the other term, at least 0.
        t_norm: Positive, no unit: the temperature in units of a row's standard deviation.
        unbiased: Divide by C - 1 in the deviation, as the authors do, instead of C.
        ignore_index: Rows with this label do not count.
        unlabelled_index: The label of rows without one.
        class_dim: Dimension of the classes.
        row_weight: One weight per row, at least 0; the mean divides by their sum.
        reduction: ``"none"``, ``"mean"`` per kept row, or ``"sum"``.
    Returns:
        Nats times the squared temperature of the teacher's row. The authors let it grow over the first 20
        epochs (1 on ImageNet); see ``warmup`` of `luce.WeightedSum`.
    Raises:
        ValueError: On a wrong shape or value, and on a label outside [0, C); see `luce.cross_entropy_loss`.
        TypeError: On a wrong dtype.
    Example:
        >>> teacher_logits = torch.tensor([[4.0, 1.0, -2.0, 0.5]])
        >>> student_logits = torch.tensor([[1.5, 1.0, -1.0, 0.0]])
        >>> normdkd_loss(student_logits, teacher_logits, torch.tensor([0]), alpha=1.0, beta=0.0)
        tensor(0.1211)

    References:
        Chi et al., NormKD: Normalized Logits for Knowledge Distillation, arXiv 2308.00520.
    """
    checks.check_positive(t_norm=t_norm)
    checks.check_not_negative(alpha=alpha, beta=beta)
    rows = Rows.of(
        student_logits,
        teacher_logits,
        target,
        row_weight,
        class_dim=class_dim,
        ignore_index=ignore_index,
        unlabelled_index=unlabelled_index,
        needs_label=True,
    )
    student, teacher, variance = _standardized(rows, unbiased)
    parts = zip((alpha, beta), dkd(student, teacher, rows.labels(), t_norm), strict=True)
    # A part of weight 0 is left out: it may be infinite, and 0 * inf is NaN.
    values = sum((weight * part for weight, part in parts if weight), start=torch.zeros_like(variance))
    return rows.reduce(t_norm**2 * torch.where(variance == 0, 0, variance * values), reduction)
