"""Losses that match relations between classes and between rows instead of values."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import checks
from .._reduce import Reduction, Rows

__all__ = ["dist_loss"]


FLOAT32 = torch.finfo(torch.float32)


def _standard(x: Tensor, weight: Tensor, dim: int) -> Tensor:
    """Standardize `x` to weighted mean 0 and norm 1 along `dim`; 0 where it is constant up to rounding."""
    if not x.numel():  # amax raises on an empty dimension
        return x
    counts, total = weight != 0, weight.sum(dim, keepdim=True)
    x = torch.where(counts, x, 0)
    size = x.detach().abs().amax(dim, keepdim=True)
    x = torch.where(counts, x - (weight * x).sum(dim, keepdim=True) / torch.where(total == 0, 1, total), 0)
    # An epsilon beside the norm, as in the authors' code, would drown classes of low probability. In its
    # place the spread must exceed what float32 rounds away, or the correlation would be one of noise. The
    # threshold is the same in float64, so that a loss does not depend on the dtype of the logits.
    spread = x.detach().abs().amax(dim, keepdim=True)
    constant = (spread <= 8 * FLOAT32.eps * size) | (size < FLOAT32.tiny / FLOAT32.eps)
    x = torch.where(constant, 0, x / torch.where(constant, 1, spread))  # no square vanishes
    square = (weight * x.square()).sum(dim, keepdim=True)
    return x * torch.where(square == 0, 0, torch.where(square == 0, 1, square).rsqrt())


def _correlation(a: Tensor, b: Tensor, weight: Tensor, dim: int) -> Tensor:
    """Return the weighted Pearson correlation along `dim`; 0 where one side is constant."""
    return (weight * _standard(a, weight, dim) * _standard(b, weight, dim)).sum(dim)


def dist_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor | None = None,
    *,
    beta: float = 2.0,
    gamma: float = 2.0,
    temperature: float = 4.0,
    scale_by_temperature: bool = True,
    ignore_index: int = -100,
    class_dim: int = 1,
    row_weight: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""DIST: correlation of the softened probabilities within each row and, for each class, across rows.

    .. math:: T^2 \left[\beta \Big(1 - \frac1N \sum_n \rho(q_{n\cdot}, p_{n\cdot})\Big)
        + \gamma \Big(1 - \frac1C \sum_c \rho(q_{\cdot c}, p_{\cdot c})\Big)\right]

    The second term couples the rows of a batch: it changes with the batch size and under gradient
    accumulation, is 1 for a single row, and is divided evenly among the rows under ``reduction="none"``.

    Args:
        student_logits: Shape ``(N, C)``, ``(N, C, ...)`` or, with ``class_dim=-1``, ``(..., C)``.
        teacher_logits: Same shape; receives no gradient.
        target: Class indices, used only to drop rows labelled `ignore_index`.
        beta: Weight of the correlation within rows, at least 0.
        gamma: Weight of the correlation across rows, at least 0.
        temperature: Positive, no unit. The paper takes 4 on CIFAR-100 and 1 on ImageNet.
        scale_by_temperature: Multiply by ``temperature**2``, as the authors' classification code does and
            the paper's pseudo-code does not.
        ignore_index: Rows with this label do not count, in either term.
        class_dim: Dimension of the classes.
        row_weight: One weight per row, at least 0; it weighs the rows in both terms.
        reduction: ``"none"``, ``"mean"`` per kept row, or ``"sum"``.
    Returns:
        Times ``temperature**2``; 0 for equal probabilities if no row and no class is constant. A constant
        one, or one whose probabilities are all below 1e-31, has correlation 0. A class excluded in both
        networks does not exist and does not count.
    Raises:
        ValueError: On a wrong shape or value.
        TypeError: On a wrong dtype.
    Example:
        >>> logits = torch.tensor([[0.0, 1.0, 3.0], [2.0, 1.0, -1.0]])
        >>> bool(dist_loss(logits, logits) < 1e-4)
        True
        >>> sure = torch.tensor([[12.0, 0.0, 0.0], [12.0, 1.0, -1.0]])  # two classes near 1e-6
        >>> bool(dist_loss(sure, sure, temperature=1.0) < 1e-4)
        True

    References:
        Huang et al., Knowledge Distillation from A Stronger Teacher, NeurIPS 2022, arXiv 2205.10536.
    """
    checks.check_positive(temperature=temperature)
    checks.check_not_negative(beta=beta, gamma=gamma)
    rows = Rows.of(
        student_logits, teacher_logits, target, row_weight, class_dim=class_dim, ignore_index=ignore_index
    )
    q = (rows.student / temperature).softmax(-1)
    p = (rows.teacher / temperature).softmax(-1)
    present = rows.present().to(q.dtype)
    within = 1 - _correlation(q, p, present, dim=-1)
    weight = rows.weight[:, None] * present
    exists = (weight != 0).any(0)
    across = torch.where(exists, 1 - _correlation(q, p, weight, dim=0), 0).sum() / exists.sum().clamp(min=1)
    values = beta * within + gamma * across
    return rows.reduce(values * temperature**2 if scale_by_temperature else values, reduction)
