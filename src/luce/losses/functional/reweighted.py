"""Relatives of KD with other weights of rows or classes, or another distance."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ... import checks
from ...labels import UNLABELLED
from ...ops.kd.reference import forward_kl
from .._reduce import Reduction, Rows

__all__ = ["nkd_loss", "tfkd_loss", "tvd_loss", "wsld_loss"]


def _is_target(rows: Rows) -> Tensor:
    """Return ``(N, C)``, True at each row's label; a row without a label is all False."""
    return torch.arange(rows.student.shape[-1], device=rows.student.device) == rows.labels()[:, None]


def _surprise(logits: Tensor, is_target: Tensor) -> Tensor:
    """Return the cross-entropy with the label, ``(N,)`` nats."""
    # Not a product with a one-hot: 0 times the -inf of an excluded class is NaN.
    return -torch.where(is_target, logits.log_softmax(-1), 0).sum(-1)


def nkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    *,
    gamma: float = 1.5,
    temperature: float = 1.0,
    ignore_index: int = -100,
    unlabelled_index: int = UNLABELLED,
    class_dim: int = 1,
    row_weight: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Normalized KD: cross-entropies of the label, weighted by the teacher, and of the other classes.

    .. math:: -p_y \log q_y - \gamma\,T^2 \sum_{i \ne y} \hat p_i \log \hat q_i

    p and q are softmaxes at temperature 1, the hats softmaxes at `temperature` over the classes other than
    the label. Both terms are cross-entropies, so the loss is not 0 where the networks agree. These are the
    distillation terms alone: the authors add the task's cross-entropy with weight 1.

    Args:
        student_logits: Shape ``(N, C)``, ``(N, C, ...)`` or, with ``class_dim=-1``, ``(..., C)``.
        teacher_logits: Same shape; receives no gradient.
        target: Class indices. Rows without a label do not count.
        gamma: Weight of the other classes, at least 0. The authors take 1.5 at temperature 1 on ImageNet and
            3.5 at temperature 3 on CIFAR-100.
        temperature: Of the other classes; positive, no unit. Their term is multiplied by its square.
        ignore_index: Rows with this label do not count.
        unlabelled_index: The label of rows without one.
        class_dim: Dimension of the classes.
        row_weight: One weight per row, at least 0; the mean divides by their sum.
        reduction: ``"none"``, ``"mean"`` per kept row, or ``"sum"``.
    Returns:
        Nats, those of the other classes times ``temperature**2``. A class at ``-inf`` in both networks does
        not exist; at ``-inf`` in the student alone it makes the loss ``+inf``. Where the teacher excludes
        all other classes their term is 0.
    Raises:
        ValueError: On a wrong shape or value, and on a label outside [0, C); see `luce.cross_entropy_loss`.
        TypeError: On a wrong dtype.
    Example:
        >>> student_logits = torch.tensor([[0.5, -1.0, 2.0, 0.3], [1.2, 0.1, -0.7, 0.4]])
        >>> teacher_logits = torch.tensor([[2.0, 1.0, 0.1, -1.0], [0.2, 2.5, -0.3, 0.9]])
        >>> nkd_loss(student_logits, teacher_logits, torch.tensor([2, 1]))
        tensor(2.4201)

    References:
        Yang et al., From Knowledge Distillation to Self-Knowledge Distillation: A Unified Approach with
        Normalized Loss and Customized Soft Labels, ICCV 2023, arXiv 2303.13005.
    """
    checks.check_positive(temperature=temperature)
    checks.check_not_negative(gamma=gamma)
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
    is_target = _is_target(rows)
    # log_softmax: in float32 a softmax is 0, and its logarithm -inf, 104 nats below the maximum.
    log_q, p = rows.student.log_softmax(-1), rows.teacher.softmax(-1)
    values = _cross_entropy(torch.where(is_target, p, 0), log_q)
    if gamma:  # at weight 0 the term is left out: it may be infinite, and 0 * inf is NaN
        # Finite, unlike -inf: a row in which the label is the only class still has a softmax.
        lowest = torch.finfo(p.dtype).min / 4
        student, teacher = (
            (logits / temperature).masked_fill(is_target, lowest) for logits in (rows.student, rows.teacher)
        )
        # Where the label is the only class its softmax here is 1 and must not count.
        others = teacher.softmax(-1).masked_fill(is_target, 0)
        values = values + gamma * temperature**2 * _cross_entropy(others, student.log_softmax(-1))
    return rows.reduce(values, reduction)


def _cross_entropy(p: Tensor, log_q: Tensor) -> Tensor:
    """Return minus the sum of ``p log q``, with ``0 log 0 = 0`` in value and gradient."""
    # At p = 0 the term is 0; 0 * -inf would be NaN.
    return -(p * torch.where(p == 0, 0, log_q)).sum(-1)


def tvd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor | None = None,
    *,
    temperature: float = 1.0,
    ignore_index: int = -100,
    class_dim: int = 1,
    row_weight: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Total variation distance: half the sum of absolute differences of the probabilities.

    .. math:: \frac12 \sum_i |p_i - q_i|, \quad p = \mathrm{softmax}(t/T), \ q = \mathrm{softmax}(s/T)

    Symmetric, and bounded by 1 even where one network excludes a class. Its gradient is bounded too and does
    not vanish as the networks approach each other: its sign changes where two probabilities are equal.

    It is not multiplied by ``temperature**2``: that factor is for divergences, which fall as
    :math:`1/T^2` as the temperature grows. This distance falls as :math:`1/T`, and unscaled it keeps its
    bound; multiply it by T to compare temperatures.

    Args:
        student_logits: Shape ``(N, C)``, ``(N, C, ...)`` or, with ``class_dim=-1``, ``(..., C)``.
        teacher_logits: Same shape; receives no gradient.
        target: Class indices, used only to drop rows labelled `ignore_index`.
        temperature: Positive, no unit.
        ignore_index: Rows with this label do not count.
        class_dim: Dimension of the classes.
        row_weight: One weight per row, at least 0; the mean divides by their sum.
        reduction: ``"none"``, ``"mean"`` per kept row, or ``"sum"``.
    Returns:
        A probability. Twice its square is at most the KL divergence of the same distributions (Pinsker).
    Raises:
        ValueError: On a wrong shape or value.
        TypeError: On a wrong dtype.
    Example:
        >>> tvd_loss(torch.tensor([[0.0, 0.0]]), torch.tensor([[50.0, 0.0]]))  # (|1 - 1/2| + |0 - 1/2|) / 2
        tensor(0.5000)

    References:
        Wen et al., f-Divergence Minimization for Sequence-Level Knowledge Distillation, ACL 2023,
        arXiv 2307.15190, has it among its divergences, for sequences.
    """
    checks.check_positive(temperature=temperature)
    rows = Rows.of(
        student_logits, teacher_logits, target, row_weight, class_dim=class_dim, ignore_index=ignore_index
    )
    p, q = ((logits / temperature).softmax(-1) for logits in (rows.teacher, rows.student))
    return rows.reduce(0.5 * (p - q).abs().sum(-1), reduction)


def wsld_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    *,
    temperature: float = 2.0,
    scale_by_temperature: bool = True,
    ignore_index: int = -100,
    unlabelled_index: int = UNLABELLED,
    class_dim: int = 1,
    row_weight: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Weighted soft labels: KD with less weight on rows whose label the student already predicts.

    .. math:: \Big(1 - e^{-L_s / L_t}\Big)\, T^2\, \mathrm{KL}(p \,\|\, q)

    where :math:`L_s` and :math:`L_t` are the two networks' cross-entropies with the label, at temperature 1.
    The weight is between 0 and 1 and receives no gradient.

    Weight, defaults and the 1e-7 that is added to :math:`L_t` are those of the authors' code. The code weighs
    the cross-entropy with the soft labels, this function the divergence: the gradient is the same, and the
    value is 0 where the networks agree. The code adds it to the task's cross-entropy with weight 2.5.

    Args:
        student_logits: Shape ``(N, C)``, ``(N, C, ...)`` or, with ``class_dim=-1``, ``(..., C)``.
        teacher_logits: Same shape; receives no gradient.
        target: Class indices. Rows without a label do not count: their weight needs it.
        temperature: Of the divergence; positive, no unit.
        scale_by_temperature: Multiply by ``temperature**2``.
        ignore_index: Rows with this label do not count.
        unlabelled_index: The label of rows without one.
        class_dim: Dimension of the classes.
        row_weight: One weight per row, at least 0; the mean divides by their sum.
        reduction: ``"none"``, ``"mean"`` per kept row (not divided by these weights), or ``"sum"``.
    Returns:
        Nats times ``temperature**2``. A class at ``-inf`` in both networks does not exist; at ``-inf`` in
        the student alone it makes the loss ``+inf``.
    Raises:
        ValueError: On a wrong shape or value, and on a label outside [0, C); see `luce.cross_entropy_loss`.
        TypeError: On a wrong dtype.
    Example:
        >>> student_logits = torch.tensor([[0.5, -1.0, 2.0, 0.3]])
        >>> teacher_logits = torch.tensor([[2.0, 1.0, 0.1, -1.0]])
        >>> student_knows = wsld_loss(student_logits, teacher_logits, torch.tensor([2]))
        >>> teacher_knows = wsld_loss(student_logits, teacher_logits, torch.tensor([0]))
        >>> bool(student_knows < teacher_knows)
        True

    References:
        Zhou et al., Rethinking Soft Labels for Knowledge Distillation: A Bias-Variance Tradeoff Perspective,
        ICLR 2021, arXiv 2102.00650.
    """
    checks.check_positive(temperature=temperature)
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
    is_target = _is_target(rows)
    # Detached: a weight with a gradient would itself be minimised.
    of_student, of_teacher = (
        _surprise(logits, is_target) for logits in (rows.student.detach(), rows.teacher)
    )
    # expm1: 1 - exp(-x) has no digits left below 6e-8. 1e-7: a certain teacher's surprise is 0.
    weight = -torch.expm1(-of_student / (of_teacher + 1e-7))
    divergence = forward_kl(rows.student, rows.teacher, temperature)
    values = torch.where(weight == 0, 0, weight * divergence)  # also where the divergence is infinite
    return rows.reduce(temperature**2 * values if scale_by_temperature else values, reduction)


def tfkd_loss(
    student_logits: Tensor,
    target: Tensor,
    *,
    correct_probability: float = 0.99,
    temperature: float = 20.0,
    scale_by_temperature: bool = True,
    ignore_index: int = -100,
    unlabelled_index: int = UNLABELLED,
    class_dim: int = 1,
    row_weight: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Teacher-free KD: a virtual teacher, nearly certain of the label and uniform on the other classes.

    .. math:: T^2\,\mathrm{KL}(p \,\|\, q), \quad p_i \propto v_i^{1/T}, \quad v_y = a,
        \ v_{i \ne y} = \frac{1 - a}{C - 1}, \quad q = \mathrm{softmax}(s/T)

    This is `luce.kd_loss` with :math:`\log v` for the teacher's logits, our reading of "softened by a
    temperature". The authors' code differs: it takes the softmax of :math:`v/T`, leaves the student
    unsoftened and divides by C. That is this function at ``temperature=1`` with :math:`a = e^d / (e^d + C
    - 1)`, :math:`d = (v_y - v_{i \ne y}) / T`, divided by C. The code has no factor :math:`T^2` but a
    multiplier per network, 1 or 100.

    The paper's other method without a teacher trains the network once, and then again with the first one as
    the teacher: that is `luce.kd_loss`.

    Args:
        student_logits: Shape ``(N, C)``, ``(N, C, ...)`` or, with ``class_dim=-1``, ``(..., C)``.
        target: Class indices, the shape of the logits without their class dimension. Rows without a label
            do not count.
        correct_probability: The virtual teacher's probability of the label, strictly between 0 and 1; the
            rest is divided evenly among the other classes that exist. The authors' code fixes it at 0.99.
        temperature: Positive, no unit. In the authors' settings 20 or 40.
        scale_by_temperature: Multiply by ``temperature**2``.
        ignore_index: Rows with this label do not count.
        unlabelled_index: The label of rows without one.
        class_dim: Dimension of the classes.
        row_weight: One weight per row, at least 0; the mean divides by their sum.
        reduction: ``"none"``, ``"mean"`` per kept row, or ``"sum"``.
    Returns:
        Nats times ``temperature**2``. Classes at ``-inf`` do not exist; those masked by a large negative
        number still get their share of the virtual teacher.
    Raises:
        ValueError: On a wrong shape or value, and on a label outside [0, C); see `luce.cross_entropy_loss`.
        TypeError: On a wrong dtype.
    Example:
        >>> tfkd_loss(torch.tensor([[0.0, 0.0]]), torch.tensor([0]), correct_probability=0.9, temperature=1.0)
        tensor(0.3681)
        >>> 0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5)
        0.36806...

    References:
        Yuan et al., Revisiting Knowledge Distillation via Label Smoothing Regularization, CVPR 2020,
        arXiv 1909.11723.
    """
    checks.check_positive(temperature=temperature)
    checks.check_between(0, 1, correct_probability=correct_probability)
    rows = Rows.of(
        student_logits,
        None,
        target,
        row_weight,
        class_dim=class_dim,
        ignore_index=ignore_index,
        unlabelled_index=unlabelled_index,
        needs_label=True,
        needs_teacher=False,
    )
    is_target = _is_target(rows)
    others = (rows.present() & ~is_target).sum(-1, keepdim=True).to(rows.student.dtype)
    # If the label is the only class, log(0) would make the rest +inf.
    rest = math.log1p(-correct_probability) - others.clamp(min=1).log()
    virtual = torch.where(is_target, math.log(correct_probability), rest)
    values = forward_kl(
        rows.student, virtual.masked_fill(~(rows.present() | is_target), -torch.inf), temperature
    )
    return rows.reduce(temperature**2 * values if scale_by_temperature else values, reduction)
