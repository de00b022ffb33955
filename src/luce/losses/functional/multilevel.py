"""Distillation at several levels: rows, similarities between rows, and similarities between classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ... import checks
from ...ops.kd import forward_kl
from .._reduce import Reduction, Rows

__all__ = ["mlld_loss"]


def mlld_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor | None = None,
    *,
    temperatures: Sequence[float] = (2.0, 3.0, 4.0, 5.0, 6.0),
    instance_weight: float = 1.0,
    batch_weight: float = 1.0,
    class_weight: float = 1.0,
    ignore_index: int = -100,
    class_dim: int = 1,
    row_weight: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Multi-level logit distillation: KD and Gram matrices of rows and of classes, at several temperatures.

    .. math:: \sum_T \left[ w_i \frac{T^2}{N} \sum_n \mathrm{KL}(P_n \,\|\, Q_n)
        + \frac{w_b}{N} \big\| P P^\top - Q Q^\top \big\|_F^2
        + \frac{w_c}{C} \big\| P^\top P - Q^\top Q \big\|_F^2 \right]

    where the rows of P and Q are the teacher's and the student's softmax at the temperature T. The second
    term grows with the number of rows and the third with its square: weights that suit one batch size do not
    suit another, nor gradient accumulation. Under ``reduction="none"`` a row has its own part of the second
    term and an even share of the third.

    This is the loss as its formulas stand. The authors' code departs from them in four ways, which are not
    copied here. It multiplies the mean of the first term and the second term by a mask of unsure rows, and
    the third term by a mask of rare classes, after averaging: each mask then acts as a factor of about one
    half. In the strongly augmented view it takes two of the temperatures from the weak view's logits, and it
    drops that view's second and third term. No mask selects rows or classes here. The code weighs every term
    by 0.9 beside a cross-entropy of weight 0.1 on both views; `luce.methods.TwoViewMethod` provides views.

    Args:
        student_logits: Shape ``(N, C)``, ``(N, C, ...)`` or, with ``class_dim=-1``, ``(..., C)``.
        teacher_logits: Same shape; receives no gradient.
        target: Class indices, used only to drop rows labelled `ignore_index`.
        temperatures: Each positive, no unit; at least one. The default is that of the code on CIFAR-100.
        instance_weight: Weight of the first term, at least 0.
        batch_weight: Weight of the second term, at least 0.
        class_weight: Weight of the third term, at least 0.
        ignore_index: Rows with this label do not count, in any term.
        class_dim: Dimension of the classes.
        row_weight: One weight per row, at least 0. In the matrices a row counts in proportion to it, N being
            the rows of a weight above 0, so that the unit of the weights does not matter.
        reduction: ``"none"``, ``"mean"`` per kept row, or ``"sum"``.
    Returns:
        Nats and squared probabilities; 0 for equal probabilities. A class at ``-inf`` in both networks does
        not exist; at ``-inf`` in the student alone it makes the first term ``+inf``. Needs room for matrices
        of N x N and of C x C; a weight of 0 spares that.
    Raises:
        ValueError: On a wrong shape or value.
        TypeError: On a wrong dtype.
    Example:
        >>> student_logits = torch.tensor([[0.5, -1.0, 2.0, 0.3], [1.2, 0.1, -0.7, 0.4]])
        >>> teacher_logits = torch.tensor([[2.0, 1.0, 0.1, -1.0], [0.2, 2.5, -0.3, 0.9]])
        >>> mlld_loss(student_logits, teacher_logits, temperatures=[4.0], instance_weight=0, batch_weight=0)
        tensor(0.0105)

    References:
        Jin, Wang and Lin, Multi-Level Logit Distillation, CVPR 2023.
    """
    _check_temperatures(temperatures)
    checks.check_not_negative(
        instance_weight=instance_weight, batch_weight=batch_weight, class_weight=class_weight
    )
    rows = Rows.of(
        student_logits, teacher_logits, target, row_weight, class_dim=class_dim, ignore_index=ignore_index
    )
    counts = rows.weight != 0
    # Without rows that count there is no class, and 0 / 0 would be NaN.
    classes = (counts[:, None] & rows.present()).any(0).sum().clamp(min=1)
    total = rows.weight.sum()
    # Mean weight 1, so that the sums over pairs of rows do not depend on the unit of the weights.
    weight = rows.weight * counts.sum() / torch.where(total == 0, 1, total)
    values = torch.zeros_like(rows.weight)
    for temperature in temperatures:
        p, q = ((logits / temperature).softmax(-1) for logits in (rows.teacher, rows.student))
        if instance_weight:
            kl = forward_kl(rows.student, rows.teacher, temperature)
            values = values + instance_weight * temperature**2 * kl
        if batch_weight:
            gap = product(p, p.T) - product(q, q.T)
            values = values + batch_weight * (gap.square() * weight).sum(-1)
        if class_weight:
            gap = product((weight[:, None] * p).T, p) - product((weight[:, None] * q).T, q)
            values = values + class_weight * gap.square().sum() / classes
    return rows.reduce(values, reduction)


def product(a: Tensor, b: Tensor) -> Tensor:
    """Return ``a @ b`` in its own dtype, under autocast and in the backward pass too.

    In 16 bits the squares of small differences would lose all their digits.
    """
    result: Tensor = _Product.apply(a, b)
    return result


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        with torch.autocast(a.device.type, enabled=False):
            return a @ b

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, Tensor]:
        a, b = ctx.saved_tensors
        # Through `product` again, so that second derivatives are in full precision too.
        return product(slope, b.T), product(a.T, slope)


def _check_temperatures(temperatures: Sequence[float]) -> None:
    if not isinstance(temperatures, Sequence) or not temperatures:
        raise ValueError(f"expected `temperatures` to be a sequence of at least one, got {temperatures!r}")
    try:
        checks.check_positive(**{f"temperatures[{i}]": value for i, value in enumerate(temperatures)})
    except ValueError as error:
        raise ValueError(
            f"expected `temperatures` of finite numbers above 0, got {temperatures!r}"
        ) from error
