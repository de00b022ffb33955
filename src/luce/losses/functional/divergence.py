"""Losses that compare distributions: cross-entropy, KD and its relatives."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ... import checks
from ...labels import UNLABELLED
from ...ops.cross_entropy import cross_entropy
from ...ops.dkd import weighted_dkd
from ...ops.engines import Backend
from ...ops.kd import forward_kl, jsd, kl_limit, reverse_kl
from .._reduce import Blocks, Reduction
from .._teacher import refuse_teacher_gradient

__all__ = ["cross_entropy_loss", "dkd_loss", "hard_label_loss", "jsd_loss", "kd_loss", "reverse_kl_loss"]


def cross_entropy_loss(
    student_logits: Tensor,
    target: Tensor,
    *,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    unlabelled_index: int = UNLABELLED,
    class_dim: int = 1,
    row_weight: Tensor | None = None,
    reduction: Reduction = "mean",
    backend: Backend = "auto",
) -> Tensor:
    r"""Cross-entropy with the labels, the loss of the task itself.

    .. math:: (1 - \epsilon)\,(-\log q_y) + \frac{\epsilon}{C} \sum_i (-\log q_i)

    Rows without a label (`unlabelled_index`) do not count, so a batch may mix labelled and unlabelled rows.

    Args:
        student_logits: Shape ``(N, C)``, ``(N, C, ...)`` or, with ``class_dim=-1``, ``(..., C)``.
        target: Class indices, the shape of the logits without their class dimension.
        label_smoothing: Probability spread evenly over all classes, in [0, 1). Classes at ``-inf`` do not
            exist and get no share.
        ignore_index: Rows with this label do not count.
        unlabelled_index: The label of rows without one.
        class_dim: Dimension of the classes.
        row_weight: One weight per row, at least 0; the mean divides by their sum.
        reduction: ``"none"`` keeps the rows' shape, ``"mean"`` is per kept row, ``"sum"``.
        backend: ``"auto"`` chooses the fastest engine; ``"cpu"``, ``"gpu"``, ``"reference"`` require it.
    Returns:
        Nats, float32 for 16-bit logits.
    Raises:
        ValueError: On a wrong shape or value, and on a label outside [0, C). Where that check would stall
            the device (CUDA, ``torch.compile``), the row's loss is NaN instead.
        TypeError: On a wrong dtype.
    Example:
        >>> import torch
        >>> cross_entropy_loss(torch.tensor([[0.5, -1.0, 2.0, 0.3]]), torch.tensor([2]))
        tensor(0.3754)
    """
    checks.check_label_smoothing(label_smoothing)
    blocks = Blocks.of(
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

    def rows(weight: Tensor | None) -> Tensor:
        return cross_entropy(
            blocks.student, blocks.labels(), label_smoothing=label_smoothing, weight=weight, backend=backend
        )

    return blocks.reduce(rows, reduction)


def hard_label_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor | None = None,
    *,
    ignore_index: int = -100,
    class_dim: int = 1,
    row_weight: Tensor | None = None,
    reduction: Reduction = "mean",
    backend: Backend = "auto",
) -> Tensor:
    r"""Cross-entropy with the teacher's top class, for teachers that return nothing else.

    .. math:: -\log q_k, \quad k = \arg\max_i t_i, \ q = \mathrm{softmax}(s)

    Among equal logits the first is the choice. Rows without a label count like others. `kd_loss` at
    temperature 1 tends to it as the teacher becomes certain.

    Args:
        student_logits: Shape ``(N, C)``, ``(N, C, ...)`` or, with ``class_dim=-1``, ``(..., C)``.
        teacher_logits: Same shape; receives no gradient.
        target: Class indices, used only to drop rows labelled `ignore_index`.
        ignore_index: Rows with this label do not count.
        class_dim: Dimension of the classes.
        row_weight: One weight per row, at least 0; the mean divides by their sum.
        reduction: ``"none"`` keeps the rows' shape, ``"mean"`` is per kept row, ``"sum"``.
        backend: ``"auto"`` chooses the fastest engine; ``"cpu"`` and ``"reference"`` require it.
    Returns:
        Nats, float32 for 16-bit logits.
    Raises:
        ValueError: On a wrong shape or value.
        TypeError: On a wrong dtype.
    Example:
        >>> import torch
        >>> hard_label_loss(torch.tensor([[0.5, -1.0, 2.0, 0.3]]), torch.tensor([[0.0, -1.0, 3.0, 1.0]]))
        tensor(0.3754)
    """
    refuse_teacher_gradient("hard_label_loss", "which depends on its top class alone")
    blocks = Blocks.of(
        student_logits,
        teacher_logits,
        target,
        row_weight,
        class_dim=class_dim,
        ignore_index=ignore_index,
    )

    def rows(weight: Tensor | None) -> Tensor:
        teacher = blocks.given_teacher()
        # argmax would hide a NaN; a label outside the classes makes the row NaN.
        choice = teacher.argmax(dim=1).masked_fill(teacher.isnan().any(dim=1), -2)
        # `cross_entropy` sees no teacher, but a float64 teacher widens the result as in the other losses.
        student = blocks.student.double() if teacher.dtype is torch.float64 else blocks.student
        return cross_entropy(student, choice, label_smoothing=0.0, weight=weight, backend=backend)

    return blocks.reduce(rows, reduction)


def _softened(
    blocks: Blocks,
    divergence: Callable[..., Tensor],
    temperature: float,
    scale_by_temperature: bool,
    reduction: Reduction,
    backend: Backend,
    share_of_limit: float = 1.0,
) -> Tensor:
    """Return a divergence at a temperature, or its limit: `share_of_limit` times that of KL."""
    checks.check_temperature(temperature, scale_by_temperature)
    factor = 1.0
    if temperature == math.inf:
        # As written the loss would be inf**2 times a divergence of 0, which is NaN; the limit is finite.
        divergence, factor = kl_limit, share_of_limit
    else:
        divergence = partial(divergence, temperature=temperature)
        factor = temperature**2 if scale_by_temperature else 1.0

    def rows(weight: Tensor | None) -> Tensor:
        return divergence(blocks.student, blocks.given_teacher(), weight=weight, backend=backend)

    return blocks.reduce(rows, reduction, factor=factor)


def kd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor | None = None,
    *,
    temperature: float = 1.0,
    scale_by_temperature: bool = True,
    ignore_index: int = -100,
    class_dim: int = 1,
    row_weight: Tensor | None = None,
    reduction: Reduction = "mean",
    backend: Backend = "auto",
) -> Tensor:
    r"""Classic knowledge distillation: the KL divergence from the teacher's softened distribution.

    .. math:: T^2 \sum_i p_i (\log p_i - \log q_i), \quad p = \mathrm{softmax}(t/T),
        \ q = \mathrm{softmax}(s/T)

    This is the distillation term alone; add cross-entropy with `luce.WeightedSum`.

    As the temperature grows it tends to half the variance, over the classes, of :math:`s_i - t_i`: logit
    matching without the common offset, half of ``logit_matching_loss(..., center=True)``. That limit is its
    value at ``math.inf``, with the gradient :math:`\frac1C[(s_i - \bar s) - (t_i - \bar t)]`; the difference
    at a finite temperature falls as 1/T.

    Args:
        student_logits: Shape ``(N, C)``, ``(N, C, ...)`` or, with ``class_dim=-1``, ``(..., C)``.
        teacher_logits: Same shape; receives no gradient.
        target: Class indices, used only to drop rows labelled `ignore_index`.
        temperature: Positive, no unit; divides both logits. ``math.inf`` gives the limit.
        scale_by_temperature: Multiply by ``temperature**2``, so that gradients keep their size as the
            temperature changes. Without it the limit is 0, and ``math.inf`` raises ValueError.
        ignore_index: Rows with this label do not count.
        class_dim: Dimension of the classes.
        row_weight: One weight per row, at least 0; the mean divides by their sum.
        reduction: ``"none"`` keeps the rows' shape, ``"mean"`` is per kept row (PyTorch's ``batchmean``),
            ``"sum"``.
        backend: ``"auto"`` chooses the fastest engine; ``"cpu"``, ``"gpu"``, ``"reference"`` require it.
    Returns:
        Nats times ``temperature**2``, float32 for 16-bit logits, accurate to rounding at every temperature. A
        class excluded (``-inf``) in both networks does not exist; one excluded in the student alone makes the
        loss ``+inf``. At an infinite temperature a class excluded in the teacher alone does so too: its
        divergence does not vanish as the temperature grows, and the factor ``temperature**2`` diverges.
    Raises:
        ValueError: On a wrong shape or value.
        TypeError: On a wrong dtype.
    Example:
        >>> import torch
        >>> student_logits = torch.tensor([[0.5, -1.0, 2.0, 0.3]])
        >>> teacher_logits = torch.tensor([[2.0, 1.0, 0.1, -1.0]])
        >>> kd_loss(student_logits, teacher_logits, temperature=4.0)
        tensor(1.4214)
        >>> kd_loss(student_logits, teacher_logits, temperature=float("inf"))
        tensor(1.4409)

    References:
        Hinton, Vinyals and Dean, Distilling the Knowledge in a Neural Network, arXiv 1503.02531; on the limit
        Chen et al., Exploring the Connection between Knowledge Distillation and Logits Matching,
        arXiv 2109.06458, whose abstract states it; we derived the formulas here ourselves.
    """
    blocks = Blocks.of(
        student_logits, teacher_logits, target, row_weight, class_dim=class_dim, ignore_index=ignore_index
    )
    return _softened(blocks, forward_kl, temperature, scale_by_temperature, reduction, backend)


def reverse_kl_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor | None = None,
    *,
    temperature: float = 1.0,
    scale_by_temperature: bool = True,
    ignore_index: int = -100,
    class_dim: int = 1,
    row_weight: Tensor | None = None,
    reduction: Reduction = "mean",
    backend: Backend = "auto",
) -> Tensor:
    r"""KL divergence from the student to the teacher, which lets a small student ignore minor modes.

    .. math:: T^2 \sum_i q_i (\log q_i - \log p_i)

    As the temperature grows it tends to the limit of `kd_loss`.

    Args:
        student_logits: Shape ``(N, C)``, ``(N, C, ...)`` or, with ``class_dim=-1``, ``(..., C)``.
        teacher_logits: Same shape; receives no gradient.
        target: Class indices, used only to drop rows labelled `ignore_index`.
        temperature: Positive, no unit; ``math.inf`` gives the limit.
        scale_by_temperature: Multiply by ``temperature**2``. Without it ``math.inf`` raises ValueError.
        ignore_index: Rows with this label do not count.
        class_dim: Dimension of the classes.
        row_weight: One weight per row, at least 0; the mean divides by their sum.
        reduction: ``"none"``, ``"mean"`` per kept row, or ``"sum"``.
        backend: ``"auto"`` chooses the fastest engine; ``"cpu"``, ``"gpu"``, ``"reference"`` require it.
    Returns:
        Nats times ``temperature**2``. A class at ``-inf`` in both networks does not exist; at ``-inf`` in
        the teacher alone it makes the loss ``+inf``, at an infinite temperature also in the student alone.
    Raises:
        ValueError: On a wrong shape or value.
        TypeError: On a wrong dtype.
    Example:
        >>> import torch
        >>> logits = torch.tensor([[0.0, 1.0]])
        >>> reverse_kl_loss(logits, logits + 3.0)
        tensor(0.)

    References:
        Gu et al., MiniLLM: Knowledge Distillation of Large Language Models, arXiv 2306.08543.
    """
    blocks = Blocks.of(
        student_logits, teacher_logits, target, row_weight, class_dim=class_dim, ignore_index=ignore_index
    )
    return _softened(blocks, reverse_kl, temperature, scale_by_temperature, reduction, backend)


def jsd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor | None = None,
    *,
    beta: float = 0.5,
    temperature: float = 1.0,
    scale_by_temperature: bool = True,
    ignore_index: int = -100,
    class_dim: int = 1,
    row_weight: Tensor | None = None,
    reduction: Reduction = "mean",
    backend: Backend = "auto",
) -> Tensor:
    r"""Generalized Jensen-Shannon divergence, bounded even where one network excludes a class.

    .. math:: T^2 \left[\beta\,\mathrm{KL}(p \,\|\, m) + (1 - \beta)\,\mathrm{KL}(q \,\|\, m)\right],
        \quad m = \beta p + (1 - \beta) q

    Divided by `beta` it tends to the forward KL as `beta` falls to 0; divided by ``1 - beta``, to the
    reverse KL as `beta` rises to 1. As the temperature grows it tends to ``beta * (1 - beta)`` times the
    limit of `kd_loss`.

    Args:
        student_logits: Shape ``(N, C)``, ``(N, C, ...)`` or, with ``class_dim=-1``, ``(..., C)``.
        teacher_logits: Same shape; receives no gradient.
        target: Class indices, used only to drop rows labelled `ignore_index`.
        beta: The teacher's share of the mixture, strictly between 0 and 1; 0.5 is the symmetric form.
        temperature: Positive, no unit; ``math.inf`` gives the limit.
        scale_by_temperature: Multiply by ``temperature**2``. Without it ``math.inf`` raises ValueError.
        ignore_index: Rows with this label do not count.
        class_dim: Dimension of the classes.
        row_weight: One weight per row, at least 0; the mean divides by their sum.
        reduction: ``"none"``, ``"mean"`` per kept row, or ``"sum"``.
        backend: ``"auto"`` chooses the fastest engine; ``"cpu"``, ``"gpu"``, ``"reference"`` require it.
    Returns:
        Nats times ``temperature**2``; at most ``log(2)`` of them for ``beta=0.5``. At an infinite temperature
        a class at ``-inf`` in one network alone makes the loss ``+inf``.
    Raises:
        ValueError: On a wrong shape or value.
        TypeError: On a wrong dtype.
    Example:
        >>> import torch
        >>> jsd_loss(torch.tensor([[50.0, 0.0]]), torch.tensor([[0.0, 50.0]]))  # log 2: nothing in common
        tensor(0.6931)

    References:
        Agarwal et al., On-Policy Distillation of Language Models, arXiv 2306.13649.
    """
    checks.check_between(0, 1, beta=beta)
    blocks = Blocks.of(
        student_logits, teacher_logits, target, row_weight, class_dim=class_dim, ignore_index=ignore_index
    )
    # For small differences JSD is beta * (1 - beta) times KL, hence its share of KL's limit.
    divergence, share = partial(jsd, beta=beta), beta * (1 - beta)
    return _softened(blocks, divergence, temperature, scale_by_temperature, reduction, backend, share)


def dkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 4.0,
    scale_by_temperature: bool = True,
    ignore_index: int = -100,
    unlabelled_index: int = UNLABELLED,
    class_dim: int = 1,
    row_weight: Tensor | None = None,
    reduction: Reduction = "mean",
    backend: Backend = "auto",
) -> Tensor:
    r"""Decoupled KD: the target against all other classes, and the other classes among themselves.

    .. math:: T^2 \left[\alpha\,\mathrm{KL}\big((p_y, 1-p_y) \,\|\, (q_y, 1-q_y)\big)
        + \beta\,\mathrm{KL}(\hat p \,\|\, \hat q)\right]

    where the hats are softmaxes over the classes other than the label. KD itself is the case ``alpha=1``
    and, row by row, ``beta = 1 - p_y``. With two classes the second term is 0.

    Args:
        student_logits: Shape ``(N, C)``, ``(N, C, ...)`` or, with ``class_dim=-1``, ``(..., C)``.
        teacher_logits: Same shape; receives no gradient.
        target: Class indices. Rows without a label do not count: they have no target class.
        alpha: Weight of the target term, at least 0.
        beta: Weight of the other term, at least 0. The paper tunes it per pair, from 0.5 to 8.
        temperature: Positive, no unit.
        scale_by_temperature: Multiply by ``temperature**2``.
        ignore_index: Rows with this label do not count.
        unlabelled_index: The label of rows without one.
        class_dim: Dimension of the classes.
        row_weight: One weight per row, at least 0; the mean divides by their sum.
        reduction: ``"none"``, ``"mean"`` per kept row, or ``"sum"``.
        backend: ``"auto"`` chooses the fastest engine; ``"cpu"``, ``"gpu"``, ``"reference"`` require it.
    Returns:
        Nats times ``temperature**2``.
    Raises:
        ValueError: On a wrong shape or value, and on a label outside [0, C); see `cross_entropy_loss`.
        TypeError: On a wrong dtype.
    Example:
        >>> import torch
        >>> student_logits = torch.tensor([[0.5, -1.0, 2.0, 0.3]])
        >>> teacher_logits = torch.tensor([[2.0, 1.0, 0.1, -1.0]])
        >>> both = dkd_loss(student_logits, teacher_logits, torch.tensor([2]), beta=0.5)
        >>> target_only = dkd_loss(student_logits, teacher_logits, torch.tensor([2]), beta=0.0)
        >>> bool(both > target_only)
        True

    References:
        Zhao et al., Decoupled Knowledge Distillation, CVPR 2022, arXiv 2203.08679.
    """
    checks.check_positive(temperature=temperature)
    checks.check_not_negative(alpha=alpha, beta=beta)
    blocks = Blocks.of(
        student_logits,
        teacher_logits,
        target,
        row_weight,
        class_dim=class_dim,
        ignore_index=ignore_index,
        unlabelled_index=unlabelled_index,
        needs_label=True,
    )

    def rows(weight: Tensor | None) -> Tensor:
        return weighted_dkd(
            blocks.student,
            blocks.given_teacher(),
            blocks.labels(),
            temperature,
            alpha=alpha,
            beta=beta,
            weight=weight,
            backend=backend,
        )

    return blocks.reduce(rows, reduction, factor=temperature**2 if scale_by_temperature else 1.0)
