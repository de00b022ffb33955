"""KD from one kind of the teacher's knowledge, and KD split into three parts.

The kinds are those of Tang et al.: that no class is impossible (universe), the relations between classes
(domain), and the difficulty of a row, which rescales its gradient (instance).
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import checks
from ...labels import UNLABELLED
from ...ops._rows import wide_dtype
from ...ops.kd.reference import forward_kl
from .._reduce import Reduction, Rows, can_ask

__all__ = ["decomposed_kd_loss", "partial_kd_loss"]

Keep = Literal[
    "uniform",
    "true_prob",
    "class_mean",
    "weight_sim",
    "true_prob+class_mean",
    "true_prob+weight_sim",
    "topk",
]
KEEPS: tuple[str, ...] = get_args(Keep)
RELATED = ("class_mean", "weight_sim", "true_prob+class_mean", "true_prob+weight_sim")
"""Values of `keep` that need a relation between the classes."""

CHUNK = 1 << 24
"""Largest number of entries converted to float64 at a time, which bounds memory."""


def class_relations(teacher_logits: Tensor, target: Tensor, *, temperature: float = 1.0) -> Tensor:
    r"""Return the teacher's mean softened distribution over the rows of each class.

    .. math:: R_{yc} = \frac{1}{N_y} \sum_{n:\, y_n = y} \mathrm{softmax}(t_n / T)_c

    Args:
        teacher_logits: Of the training rows, shape ``(N, C)``.
        target: Class indices, shape ``(N,)``. Rows with a negative label do not count.
        temperature: Positive, no unit.
    Returns:
        ``(C, C)``, one distribution per class; a class without rows has a row of zeros. Summed in float64,
        in the order of the rows, and returned in the dtype of the logits, at least float32.
    Raises:
        ValueError: On a wrong shape or value, and on a label of C or above.
        TypeError: On a wrong dtype.
    Example:
        >>> logits = torch.tensor([[0.8, 0.2], [0.6, 0.4]]).log()
        >>> class_relations(logits, torch.tensor([0, 0]))
        tensor([[0.7000, 0.3000],
                [0.0000, 0.0000]])
    """
    checks.check_positive(temperature=temperature)
    checks.check_logits("teacher_logits", teacher_logits)
    if teacher_logits.ndim != 2:
        raise ValueError(f"expected `teacher_logits` of shape (N, C), got {tuple(teacher_logits.shape)}")
    checks.check_target(target, teacher_logits.shape[:1], teacher_logits)
    classes = teacher_logits.shape[1]
    if target.numel() and int(target.max()) >= classes:
        raise checks.wrong_label(int(target.max()), classes)
    # float64: sums over many rows in float32 would drop small probabilities. MPS has none.
    wide = torch.float32 if teacher_logits.device.type == "mps" else torch.float64
    sums = torch.zeros(classes, classes, dtype=wide, device=teacher_logits.device)
    size = max(1, CHUNK // classes)
    for logits, labels in zip(teacher_logits.detach().split(size), target.split(size), strict=True):
        counts = labels >= 0
        sums.index_add_(0, labels[counts], (logits[counts].to(wide) / temperature).softmax(-1))
    rows = target[target >= 0].bincount(minlength=classes)
    # A class without rows keeps zeros, where 0 / 0 would be NaN.
    return (sums / rows.clamp(min=1)[:, None]).to(wide_dtype(teacher_logits))


def weight_similarity(weight: Tensor, *, alpha: float = 1.0) -> Tensor:
    r"""Return the similarity of classes in a linear classifier: a softmax over the cosines of their weights.

    .. math:: R_{yc} = \mathrm{softmax}_c\big(\alpha \cos(w_y, w_c)\big)

    The power alpha of a distribution, normalised again, is a softmax of alpha times its logits. The bias is
    ignored.

    Args:
        weight: Of the teacher's last linear layer, shape ``(C, D)``.
        alpha: At least 0, no unit: 0 gives uniform rows, a large value one-hot rows.
    Returns:
        ``(C, C)``, one distribution per class.
    Raises:
        ValueError: On a wrong shape or value.
        TypeError: On a wrong dtype.
    Example:
        >>> weight_similarity(torch.tensor([[1.0, 0.0], [0.0, 3.0]]), alpha=0.0)
        tensor([[0.5000, 0.5000],
                [0.5000, 0.5000]])
    """
    checks.check_not_negative(alpha=alpha)
    checks.check_logits("weight", weight)
    if weight.ndim != 2:
        raise ValueError(f"expected `weight` of shape (C, D), got {tuple(weight.shape)}")
    unit = F.normalize(weight.detach().to(wide_dtype(weight)), dim=-1)
    return (alpha * (unit @ unit.T)).softmax(-1)


def partial_target(
    teacher_logits: Tensor,
    target: Tensor,
    *,
    keep: Keep = "true_prob",
    temperature: float = 1.0,
    relation: Tensor | None = None,
    label_smoothing: float = 0.1,
    top_k: int | float | None = None,
    always_keep_true: bool = False,
    ignore_index: int = -100,
    unlabelled_index: int = UNLABELLED,
    class_dim: int = 1,
) -> Tensor:
    r"""Return the teacher's softened distribution reduced to one kind of knowledge.

    With :math:`\rho = \mathrm{softmax}(t/T)` and the label y, the target has

    ======================= =========================================================== ====================
    ``keep``                on y; on another class c                                    keeps
    ======================= =========================================================== ====================
    ``uniform``             :math:`1 - \epsilon + \epsilon/C`; :math:`\epsilon/C`       universe
    ``true_prob``           :math:`\rho_y`; :math:`(1 - \rho_y)/(C - 1)`                universe, instance
    ``class_mean``          :math:`R_{yy}; R_{yc}` of `class_relations`                 universe, domain
    ``weight_sim``          :math:`R_{yy}; R_{yc}` of `weight_similarity`               universe, domain
    ``true_prob+...``       :math:`\rho_y`; :math:`(1 - \rho_y) R_{yc}/(1 - R_{yy})`    all but what relates
                                                                                        single rows to classes
    ``topk``                :math:`\rho` of the k largest; the others evenly            all, without noise
    ======================= =========================================================== ====================

    where ``...`` is ``class_mean`` or ``weight_sim``. The three kinds of knowledge are those of the paper's
    abstract. ``true_prob``, ``weight_sim``, their sum and ``topk`` follow our memory of the methods that it
    calls KD-pt, KD-sim, KD-pt+sim and KD-topk. We had neither its text nor its code to compare with, and the
    form of the similarity is the least certain. ``class_mean`` is our addition, and so are these rules:
    everything is built on the softened :math:`\rho`, but the temperature does not change label smoothing or
    the relation; the relation of the sums divides means, not row by row; ties rank the lower class first.

    Args:
        teacher_logits: Shape ``(N, C)``, ``(N, C, ...)`` or, with ``class_dim=-1``, ``(..., C)``.
        target: Class indices, the shape of the logits without their class dimension.
        keep: The kind of knowledge to keep.
        temperature: Positive, no unit.
        relation: Shape ``(C, C)``, not negative, for every ``keep`` with ``class_mean`` or ``weight_sim``,
            which differ in nothing else. Only proportions within a row matter; a row without mass on the
            classes that receive it counts as uniform.
        label_smoothing: Epsilon of ``uniform``, in [0, 1).
        top_k: How many classes ``topk`` keeps: an integer of at least 1, or a fraction of them in (0, 1].
        always_keep_true: Rank the label first in ``topk``. With ``top_k=1`` it is ``true_prob``.
        ignore_index: Rows with this label have no target.
        unlabelled_index: The label of rows without one; they have no target either.
        class_dim: Dimension of the classes.
    Returns:
        Probabilities in the shape of the logits, at least float32, without gradient; zeros in rows without a
        label. Classes at ``-inf`` do not exist and get nothing.
    Raises:
        ValueError: On a wrong shape or value, and on a label outside [0, C); see `cross_entropy_loss`. Where
            asking would stall the device or the compiler, a row of negative relations is NaN.
        TypeError: On a wrong dtype, or a missing relation.
    Example:
        >>> logits = torch.tensor([[0.7, 0.2, 0.1]]).log()
        >>> partial_target(logits, torch.tensor([0]))
        tensor([[0.7000, 0.1500, 0.1500]])
        >>> partial_target(logits, torch.tensor([2]), keep="topk", top_k=1)
        tensor([[0.7000, 0.1500, 0.1500]])

    References:
        Tang et al., Understanding and Improving Knowledge Distillation, arXiv 2002.03532.
    """
    checks.check_logits("teacher_logits", teacher_logits)
    rows = Rows.of(
        teacher_logits,
        None,
        target,
        None,
        class_dim=class_dim,
        ignore_index=ignore_index,
        unlabelled_index=unlabelled_index,
        needs_label=True,
        needs_teacher=False,
    )
    probs = _target(rows, keep, temperature, relation, label_smoothing, top_k, always_keep_true)
    # The product keeps the NaN weight of a wrong label that could not be reported.
    probs = torch.where(rows.weight[:, None] == 0, 0, rows.weight[:, None] * probs)
    axis = checks.class_axis(teacher_logits, class_dim)
    return probs.reshape(*rows.shape, probs.shape[-1]).movedim(-1, axis)


def partial_kd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    *,
    keep: Keep = "true_prob",
    temperature: float = 1.0,
    relation: Tensor | None = None,
    label_smoothing: float = 0.1,
    top_k: int | float | None = None,
    always_keep_true: bool = False,
    scale_by_temperature: bool = True,
    ignore_index: int = -100,
    unlabelled_index: int = UNLABELLED,
    class_dim: int = 1,
    row_weight: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Partial KD: KD from a target that keeps one kind of the teacher's knowledge.

    .. math:: T^2\,\mathrm{KL}\big(r \,\|\, \mathrm{softmax}(s/T)\big)

    where r is `luce.losses.partial_target`, whose docstring defines each ``keep`` and its source. A
    cross-entropy with r has the same gradient; the KL divergence is 0 where the student's distribution is r.

    Args:
        student_logits: Shape ``(N, C)``, ``(N, C, ...)`` or, with ``class_dim=-1``, ``(..., C)``.
        teacher_logits: Same shape; receives no gradient.
        target: Class indices. Rows without a label do not count: the target depends on it.
        keep: The kind of knowledge to keep; see `luce.losses.partial_target`, also for the next five.
        temperature: Positive, no unit.
        relation: Shape ``(C, C)``: `class_relations` or `weight_similarity`, where ``keep`` names either.
        label_smoothing: Of ``uniform``, in [0, 1).
        top_k: Of ``topk``: an integer of at least 1, or a fraction of the classes in (0, 1].
        always_keep_true: Of ``topk``.
        scale_by_temperature: Multiply by ``temperature**2``.
        ignore_index: Rows with this label do not count.
        unlabelled_index: The label of rows without one.
        class_dim: Dimension of the classes.
        row_weight: One weight per row, at least 0; the mean divides by their sum.
        reduction: ``"none"``, ``"mean"`` per kept row, or ``"sum"``.
    Returns:
        Nats times ``temperature**2``. A class at ``-inf`` in both networks does not exist; at ``-inf`` in the
        student alone it makes the loss ``+inf``, unless the target has nothing there.
    Raises:
        ValueError: On a wrong shape or value, and on a label outside [0, C); see `cross_entropy_loss`.
        TypeError: On a wrong dtype, or a missing relation.
    Example:
        >>> student_logits = torch.tensor([[0.5, -1.0, 2.0, 0.3]])
        >>> teacher_logits = torch.tensor([[2.0, 1.0, 0.1, -1.0]])
        >>> partial_kd_loss(student_logits, teacher_logits, torch.tensor([2]), temperature=4.0)
        tensor(0.8966)

    References:
        Tang et al., Understanding and Improving Knowledge Distillation, arXiv 2002.03532.
    """
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
    r = _target(rows, keep, temperature, relation, label_smoothing, top_k, always_keep_true)
    nothing = r == 0  # whose logarithm has no derivative
    log_r = r.masked_fill(nothing, 1).log().masked_fill(nothing, -torch.inf)
    values = forward_kl(rows.student / temperature, log_r, 1.0)
    return rows.reduce(values * temperature**2 if scale_by_temperature else values, reduction)


def decomposed_kd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    *,
    guidance_weight: float = 1.0,
    smooth_weight: float = 1.0,
    relation_weight: float = 1.0,
    temperature: float = 1.0,
    scale_by_temperature: bool = True,
    ignore_index: int = -100,
    unlabelled_index: int = UNLABELLED,
    class_dim: int = 1,
    row_weight: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""KD in three weighted parts: towards the label, towards smoothness, and between the other classes.

    .. math:: -T^2 \Big[ w_g\, p_y \log q_y + w_s\, m \sum_{c \ne y} \log q_c
        + w_r \sum_{c \ne y} (p_c - m) \log q_c \Big], \quad m = \frac{1 - p_y}{C - 1}

    with p and q the softened distributions of teacher and student. With all weights 1 this is the
    cross-entropy between them: `kd_loss` plus the teacher's entropy, with the same gradient. Without the last
    part it is, up to a constant, `partial_kd_loss` with ``keep="true_prob"``. The identity is exact. The
    split follows our memory of a later paper on why larger networks can be worse teachers; the names of the
    weights are ours.

    Args:
        student_logits: Shape ``(N, C)``, ``(N, C, ...)`` or, with ``class_dim=-1``, ``(..., C)``.
        teacher_logits: Same shape; receives no gradient.
        target: Class indices. Rows without a label do not count: they have no guidance part.
        guidance_weight: Weight of the part that raises the label, at least 0.
        smooth_weight: Weight of the part that raises all other classes equally, at least 0.
        relation_weight: Weight of the part that separates the other classes, at least 0. Above
            `smooth_weight` it may push a class down without bound and make the loss negative.
        temperature: Positive, no unit.
        scale_by_temperature: Multiply by ``temperature**2``.
        ignore_index: Rows with this label do not count.
        unlabelled_index: The label of rows without one.
        class_dim: Dimension of the classes.
        row_weight: One weight per row, at least 0; the mean divides by their sum.
        reduction: ``"none"``, ``"mean"`` per kept row, or ``"sum"``.
    Returns:
        Nats times ``temperature**2``. Classes at ``-inf`` are treated as in `partial_kd_loss`.
    Raises:
        ValueError: On a wrong shape or value, and on a label outside [0, C); see `cross_entropy_loss`.
        TypeError: On a wrong dtype.
    Example:
        >>> student_logits = torch.tensor([[1.0, 0.5, -0.5, 0.0]])
        >>> teacher_logits = torch.tensor([[4.0, 2.0, -1.0, 0.0]])
        >>> target = torch.tensor([0])
        >>> decomposed_kd_loss(student_logits, teacher_logits, target)
        tensor(0.8701)
        >>> decomposed_kd_loss(student_logits, teacher_logits, target, guidance_weight=0, relation_weight=0)
        tensor(0.2470)

    References:
        Tang et al., Understanding and Improving Knowledge Distillation, arXiv 2002.03532.
    """
    checks.check_positive(temperature=temperature)
    checks.check_not_negative(
        guidance_weight=guidance_weight, smooth_weight=smooth_weight, relation_weight=relation_weight
    )
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
    p = (rows.teacher / temperature).softmax(-1)
    log_q = (rows.student / temperature).log_softmax(-1)
    at_label = _at_label(rows)
    others = rows.present() & ~at_label
    # Summed: 1 - p of the label is only rounding once p is near 1.
    rest = p.masked_fill(at_label, 0).sum(-1, keepdim=True)
    even = others * (rest / others.sum(-1, keepdim=True).clamp(min=1))
    share = torch.where(
        at_label, guidance_weight * p, (smooth_weight - relation_weight) * even + relation_weight * p
    )
    # Excluded classes have share 0 and log_q = -inf, and 0 * -inf is NaN.
    values = -(share * torch.where(share == 0, 0, log_q)).sum(-1)
    return rows.reduce(values * temperature**2 if scale_by_temperature else values, reduction)


def _target(
    rows: Rows,
    keep: Keep,
    temperature: float,
    relation: Tensor | None,
    label_smoothing: float,
    top_k: int | float | None,
    always_keep_true: bool,
) -> Tensor:
    """Return `partial_target` of rows ``(N, C)``.

    Kept classes have the teacher's probability; the remaining mass is spread over the others by weights.
    """
    checks.check_positive(temperature=temperature)
    checks.check_choice("keep", keep, KEEPS)
    checks.check_label_smoothing(label_smoothing)
    _check_top_k(top_k, needed=keep == "topk")
    rho = (rows.teacher / temperature).softmax(-1)
    at_label, present = _at_label(rows), rows.present()
    kept, weights = torch.zeros_like(present), torch.ones_like(rho)
    if keep == "topk":
        assert top_k is not None
        kept = _largest(rows.teacher, present, at_label if always_keep_true else kept, top_k)
    elif keep.startswith("true_prob"):
        kept = at_label
    if keep in RELATED:
        weights = _relation_of(rows, relation, keep)
    elif keep == "uniform":
        even = present.to(rho) / present.sum(-1, keepdim=True).clamp(min=1)
        weights = (1 - label_smoothing) * at_label.to(rho) + label_smoothing * even
    return rho.masked_fill(~kept, 0) + _spread(rho.masked_fill(kept, 0), weights, present & ~kept)


def _spread(mass: Tensor, weights: Tensor, places: Tensor) -> Tensor:
    """Spread the mass of each row over its places, in proportion to weights; evenly where all are 0."""
    weights = weights.masked_fill(~places, 0)
    total = weights.sum(-1, keepdim=True)
    even = places.to(weights) / places.sum(-1, keepdim=True).clamp(min=1)
    # A relation may be 0 on all classes that receive mass, and 0 / 0 is NaN.
    share = torch.where(total == 0, even, weights / torch.where(total == 0, 1, total))
    return mass.sum(-1, keepdim=True) * share


def _at_label(rows: Rows) -> Tensor:
    return rows.labels()[:, None] == torch.arange(rows.teacher.shape[-1], device=rows.teacher.device)


def _largest(teacher: Tensor, present: Tensor, first: Tensor, top_k: int | float) -> Tensor:
    """Return True at the `top_k` largest logits of each row, ties by class; `first` counts as the largest."""
    # By the logits: equal probabilities after rounding would tie.
    order = teacher.masked_fill(first, torch.inf).argsort(dim=-1, descending=True, stable=True)
    rank = order.argsort(-1)
    if isinstance(top_k, float):
        # A fraction below half a class would keep none.
        return rank < (top_k * present.sum(-1, keepdim=True)).round().clamp(min=1)
    return rank < top_k


def _check_top_k(top_k: int | float | None, needed: bool) -> None:
    if top_k is None and not needed:
        return
    if isinstance(top_k, float):
        good = 0 < top_k <= 1
    else:
        good = isinstance(top_k, int) and not isinstance(top_k, bool) and 1 <= top_k <= checks.LARGEST
    if not good:
        raise ValueError(
            "expected `top_k` to be an integer of at least 1 or a fraction of the classes in (0, 1], "
            f"got {top_k!r}"
        )


def _relation_of(rows: Rows, relation: Tensor | None, keep: str) -> Tensor:
    """Return the relation of each row's label, ``(N, C)``; of an arbitrary class in rows without one."""
    if not isinstance(relation, Tensor):
        raise TypeError(
            f"expected `relation` to be a torch.Tensor for `keep={keep!r}`, got {type(relation).__name__}; "
            "see `luce.losses.class_relations` and `luce.losses.weight_similarity`"
        )
    classes = rows.teacher.shape[-1]
    if relation.shape != (classes, classes):
        raise ValueError(
            f"expected `relation` of shape {(classes, classes)}, a row for each class of the logits, "
            f"got {tuple(relation.shape)}"
        )
    # Clamped: on CUDA a wrong label would trip a device-side assert, after which the process is lost.
    weights = relation.detach().to(rows.teacher)[rows.labels().clamp(0, classes - 1)]
    negative = weights < 0
    if can_ask(negative) and bool(negative.any()):
        raise ValueError(f"expected `relation` of numbers of at least 0, got {weights[negative][0].item()}")
    return weights.masked_fill(negative, torch.nan)  # where the check above would stall
