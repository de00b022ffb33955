"""Losses on the teacher's ranking of the classes: PLD and the classical list-wise losses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ... import checks
from ...labels import UNLABELLED
from ...ops import pld as ops
from ...ops.engines import Backend
from ...ops.pld import (
    EVERY_PLACE,
    PldOptions,
    default_tolerance,
    given_ranking,
    label_first,
    pld,
    pld_with_bound,
    ranking_nll,
)
from ...ops.pld.options import Ties
from .._reduce import Blocks, Reduction, Rows, can_ask

__all__ = ["listmle_loss", "listnet_loss", "p_listmle_loss", "pld_loss"]

NO_RANKING = "hold every class once"
"""In the message of the native operator."""


def teacher_order(teacher_logits: Tensor, *, class_dim: int = 1) -> Tensor:
    """Return the classes by falling teacher logit, the lower class index first among equals.

    Compute it once and pass it to `pld_loss` to skip the sort in every step with the same teacher logits.

    Args:
        teacher_logits: Shape ``(N, C)``, ``(N, C, ...)`` or, with ``class_dim=-1``, ``(..., C)``.
        class_dim: Dimension of the classes.
    Returns:
        Class indices, int64, of the same shape; ``.int()`` halves their memory.
    Example:
        >>> teacher_order(torch.tensor([[0.5, 2.0, 0.5]]))
        tensor([[1, 0, 2]])
    """
    checks.check_logits("teacher_logits", teacher_logits)
    axis = checks.class_axis(teacher_logits, class_dim)
    # Stable: the order of equal logits, common in 16 bits, must not depend on the device.
    return teacher_logits.sort(dim=axis, descending=True, stable=True).indices


@dataclass(eq=False, repr=False, kw_only=True)
class PLDPlaces:
    """Options of PLD about the places of its ranking, shared by its functions and modules; see `pld_loss`."""

    top_k: int | None = None
    epsilon: float | None = None
    tolerance: float | None = None
    ties: Ties = "stable"

    def settle(
        self, student_logits: Tensor, teacher_logits: Tensor, teacher_temperature: float
    ) -> PldOptions:
        """Check all options, and return them as the engines take them.

        Raises:
            ValueError: On a wrong value, or options that do not go together.
        """
        checks.check_positive(teacher_temperature=teacher_temperature)
        checks.check_top_k(self.top_k)
        checks.check_choice("ties", self.ties, ("stable", "average"))
        if self.epsilon is not None:
            checks.check_between(0, 1, epsilon=self.epsilon)
        if self.ties == "average" and (self.top_k is not None or self.epsilon is not None):
            raise ValueError(
                "expected ties='stable' with `top_k` or `epsilon`: they may cut a group of equals in two"
            )
        tolerance = self.tolerance
        if tolerance is None:
            tolerance = default_tolerance(student_logits, teacher_logits)
        checks.check_not_negative(tolerance=tolerance)
        places = EVERY_PLACE if self.top_k is None else self.top_k
        return PldOptions(teacher_temperature, places, self.epsilon or 0.0, tolerance, self.ties == "average")


def pld_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor | None = None,
    *,
    teacher_temperature: float = 1.0,
    top_k: int | None = None,
    epsilon: float | None = None,
    tolerance: float | None = None,
    ties: Ties = "stable",
    teacher_order: Tensor | None = None,
    ignore_index: int = -100,
    unlabelled_index: int = UNLABELLED,
    class_dim: int = 1,
    row_weight: Tensor | None = None,
    reduction: Reduction = "mean",
    backend: Backend = "auto",
) -> Tensor:
    r"""Plackett-Luce Distillation: choose the label first, then the other classes as the teacher ranks them.

    .. math:: \sum_{k=1}^{C} \alpha_k \Big(\log \sum_{l \ge k} e^{s_{\pi_l}} - s_{\pi_k}\Big)

    where :math:`\pi` is the label followed by the other classes by falling teacher logit, and
    :math:`\alpha_k` the teacher's probability of the class in place *k*. The loss is convex in the student's
    logits, does not change with a constant added to a row, and equals cross-entropy when the teacher is
    certain of the label. Use it alone: the first place already contains cross-entropy, weighted by the
    teacher's probability. There is no factor for the temperature.

    A row without a label (`target` None, or `unlabelled_index`) takes the teacher's own order, its top class
    in the label's place: our extension for unlabelled transfer data.

    Args:
        student_logits: Shape ``(N, C)``, ``(N, C, ...)`` or, with ``class_dim=-1``, ``(..., C)``.
        teacher_logits: Same shape; receives no gradient.
        target: Class indices, the shape of the logits without their class dimension.
        teacher_temperature: Positive, no unit; softens the weights only. Neither the ranking nor the
            student's logits change with it.
        top_k: Count only the first places. Every suffix keeps all its classes, so that the result is at
            most ``epsilon * (log(C - top_k) + range)`` below the full loss, `epsilon` being the teacher's
            probability outside the first `top_k` places and `range` the spread of the student's logits
            there; gradients differ by at most ``2 * epsilon`` in the sum of absolute values.
        epsilon: Count, in each row, only as many first places as leave less than this of the teacher's
            probability; the bounds of `top_k` hold with it.
        tolerance: Upper bound of the error from leaving nearly equal classes unsorted in rows of more than
            1024 classes: of the loss, in nats, and of the gradient, in the sum of absolute values. None takes
            0 in float64, 1e-5 in float32 and 1e-3 if either network is in 16 bits; 0 sorts everything.
            `pld_error_bound` returns the bound that was reached.
        ties: Equal teacher logits rank the lower class index first (``"stable"``), or share their places so
            that the numbering of classes does not matter (``"average"``, Efron's rule). Ties are common with
            16-bit teachers.
        teacher_order: The result of `luce.teacher_order` for these teacher logits, int64 or int32; it skips
            the sort.
        ignore_index: Rows with this label do not count.
        unlabelled_index: The label of rows without one.
        class_dim: Dimension of the classes.
        row_weight: One weight per row, at least 0; the mean divides by their sum.
        reduction: ``"none"`` keeps the rows' shape, ``"mean"`` is per kept row, ``"sum"``.
        backend: ``"auto"`` chooses the fastest engine here; ``"cpu"``, ``"gpu"`` and ``"reference"`` require
            that engine.
    Returns:
        Nats, float32 for 16-bit logits. A class at ``-inf`` in both networks does not exist; at ``-inf`` in
        the student alone it makes the loss ``+inf``, in the teacher alone it only ranks last.
    Raises:
        ValueError: On a wrong shape or value, on a label outside [0, C), see `cross_entropy_loss`, and on a
            row of `teacher_order` that is no ranking (on a CUDA device, where the check would stall, the
            row's loss is NaN instead).
        TypeError: On a wrong dtype.
        RuntimeError: If the named backend cannot run here.
    Example:
        >>> student_logits = torch.tensor([[0.5, -1.0, 2.0, 0.3]])
        >>> teacher_logits = torch.tensor([[2.0, 1.0, 0.1, -1.0]])
        >>> pld_loss(student_logits, teacher_logits, torch.tensor([2]))
        tensor(0.8530)
        >>> pld_loss(student_logits, teacher_logits)  # no label: the teacher's own order
        tensor(1.9659)

    References:
        Bassam, Zhu and Bian, PLD: A Choice-Theoretic List-Wise Knowledge Distillation, arXiv 2506.12542.
    """
    blocks = Blocks.of(
        student_logits,
        teacher_logits,
        target,
        row_weight,
        class_dim=class_dim,
        ignore_index=ignore_index,
        unlabelled_index=unlabelled_index,
    )
    places = PLDPlaces(top_k=top_k, epsilon=epsilon, tolerance=tolerance, ties=ties)
    options = places.settle(student_logits, teacher_logits, teacher_temperature)
    if teacher_order is not None:
        checks.check_order(teacher_order, teacher_logits)
        teacher_order = blocks.laid_out(teacher_order)

    def rows(weight: Tensor | None) -> Tensor:
        return pld(
            blocks.student,
            blocks.given_teacher(),
            blocks.target,
            weight=weight,
            order=teacher_order,
            options=options,
            backend=backend,
        )

    if teacher_order is None:
        return blocks.reduce(rows, reduction)
    try:
        result = blocks.reduce(rows, reduction)
    except RuntimeError as error:  # of the native operator, which looks at each row in passing
        if NO_RANKING not in str(error):
            raise
        raise _no_ranking() from error
    if can_ask(result) and bool(result.isnan().any()):
        _, unranked = given_ranking(teacher_order, blocks.weight)
        if bool(unranked.any()):
            raise _no_ranking()
    return result


def _no_ranking() -> ValueError:
    return ValueError(
        "expected each row of `teacher_order` to hold every class once; make it with `luce.teacher_order`"
    )


def pld_error_bound(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor | None = None,
    *,
    teacher_temperature: float = 1.0,
    ignore_index: int = -100,
    unlabelled_index: int = UNLABELLED,
    class_dim: int = 1,
    backend: Backend = "auto",
    **places: Any,
) -> tuple[Tensor, Tensor]:
    """Bound, row by row, the error of `pld_loss` with these options against the full, sorted loss.

    Args:
        student_logits: As for `pld_loss`, and so are all other arguments.
        places: `top_k`, `epsilon`, `tolerance` and `ties`, as for `pld_loss`.
    Returns:
        Two tensors of the rows' shape: the largest possible difference of the loss, in nats, and of its
        gradient, in the sum of absolute values, without rounding errors. 0 in rows that do not count.
    Raises:
        ValueError: On a wrong shape or value, and on a label outside [0, C), where a CUDA device gives NaN.
        TypeError: On a wrong dtype.
    Example:
        >>> student_logits = torch.tensor([[0.5, -1.0, 2.0, 0.3]])
        >>> teacher_logits = torch.tensor([[2.0, 1.0, 0.1, -1.0]])
        >>> pld_error_bound(student_logits, teacher_logits, torch.tensor([2]), top_k=2)
        (tensor([0.5312]), tensor([0.5330]))
    """
    blocks = Blocks.of(
        student_logits,
        teacher_logits,
        target,
        None,
        class_dim=class_dim,
        ignore_index=ignore_index,
        unlabelled_index=unlabelled_index,
    )
    options = PLDPlaces(**places).settle(student_logits, teacher_logits, teacher_temperature)
    _, bound = pld_with_bound(
        blocks.student.detach(),
        blocks.given_teacher(),
        blocks.target,
        weight=blocks.weight,
        options=options,
        backend=backend,
    )
    if blocks.target is not None:
        if can_ask(bound):
            blocks.check_labels()
        else:
            bound = bound.masked_fill(blocks.wrong_labels().reshape(-1, 1), torch.nan)
    of_loss, of_gradient = bound.reshape(*blocks.shape, 2).unbind(-1)
    return of_loss, of_gradient


def _ranking(rows: Rows) -> tuple[Tensor, Tensor]:
    """Return the classes by place, and 1 for each place whose class exists, else 0.

    The second is NaN in rows without any class and where the teacher has NaN, which a sort would hide.
    """
    order = label_first(ops.teacher_order(rows.teacher), rows.labels())
    present = rows.present()
    unknown = rows.teacher.isnan().any(-1) | ~present.any(-1)
    places = present.gather(-1, order).to(rows.student.dtype)
    return order, places.masked_fill(unknown[:, None], torch.nan)


def listmle_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor | None = None,
    *,
    ignore_index: int = -100,
    unlabelled_index: int = UNLABELLED,
    class_dim: int = 1,
    row_weight: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""ListMLE: the negative log-likelihood of the teacher's ranking under the student's Plackett-Luce model.

    .. math:: \sum_{k=1}^{C} \Big(\log \sum_{l \ge k} e^{s_{\pi_l}} - s_{\pi_k}\Big)

    Args:
        student_logits: Shape ``(N, C)``, ``(N, C, ...)`` or, with ``class_dim=-1``, ``(..., C)``.
        teacher_logits: Same shape; only their order counts, the lower class index first among equals.
        target: Class indices that take the first place; None for the teacher's own order, as ListMLE was
            published.
        ignore_index: Rows with this label do not count.
        unlabelled_index: The label of rows without one.
        class_dim: Dimension of the classes.
        row_weight: One weight per row, at least 0; the mean divides by their sum.
        reduction: ``"none"``, ``"mean"`` per kept row, or ``"sum"``.
    Returns:
        Nats per list. A class at ``-inf`` in both networks does not exist and does not count.
    Raises:
        ValueError: On a wrong shape or value, and on a label outside [0, C); see `cross_entropy_loss`.
        TypeError: On a wrong dtype.
    Example:
        >>> listmle_loss(torch.tensor([[0.6, 0.8]]), torch.tensor([[1.0, 0.0]]))  # log(1 + e**0.2)
        tensor(0.7981)

    References:
        Xia et al., Listwise Approach to Learning to Rank: Theory and Algorithm, ICML 2008.
    """
    rows = Rows.of(
        student_logits,
        teacher_logits,
        target,
        row_weight,
        class_dim=class_dim,
        ignore_index=ignore_index,
        unlabelled_index=unlabelled_index,
    )
    order, places = _ranking(rows)
    return rows.reduce(ranking_nll(rows.student.gather(-1, order), places), reduction)


def p_listmle_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor | None = None,
    *,
    normalize: bool = True,
    ignore_index: int = -100,
    unlabelled_index: int = UNLABELLED,
    class_dim: int = 1,
    row_weight: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Position-aware ListMLE, which weighs the first places of the ranking most.

    .. math:: \sum_{k=1}^{C} a_k \Big(\log \sum_{l \ge k} e^{s_{\pi_l}} - s_{\pi_k}\Big),
        \quad a_k = 2^{C-k} - 1

    Args:
        student_logits: Shape ``(N, C)``, ``(N, C, ...)`` or, with ``class_dim=-1``, ``(..., C)``.
        teacher_logits: Same shape; only their order counts, the lower class index first among equals.
        target: Class indices that take the first place; None for the teacher's own order.
        normalize: Scale the weights of a row to sum to 1. The unscaled weights are the paper's; they overflow
            float32 at 129 classes.
        ignore_index: Rows with this label do not count.
        unlabelled_index: The label of rows without one.
        class_dim: Dimension of the classes.
        row_weight: One weight per row, at least 0; the mean divides by their sum.
        reduction: ``"none"``, ``"mean"`` per kept row, or ``"sum"``.
    Returns:
        Weighted nats per list. A class at ``-inf`` in both networks does not exist and does not count.
    Raises:
        ValueError: On a wrong shape or value, on a label outside [0, C) (see `cross_entropy_loss`), and
            where ``normalize=False`` would overflow.
        TypeError: On a wrong dtype.
    Example:
        >>> p_listmle_loss(torch.tensor([[0.6, 0.8]]), torch.tensor([[1.0, 0.0]]))  # weights 1 and 0
        tensor(0.7981)

    References:
        Lan et al., Position-Aware ListMLE: A Sequential Learning Process for Ranking, UAI 2014.
    """
    rows = Rows.of(
        student_logits,
        teacher_logits,
        target,
        row_weight,
        class_dim=class_dim,
        ignore_index=ignore_index,
        unlabelled_index=unlabelled_index,
    )
    if not normalize:
        checks.check_power_of_two(rows.student.shape[-1], rows.student.dtype)
    order, places = _ranking(rows)
    k, length = places.cumsum(-1), places.sum(-1, keepdim=True)
    if normalize:  # scaled by 2**-C before the sum, so that no number of classes overflows
        # In float32 places beyond the 149th underflow to 0: their share is below 2**-149.
        weights = places * (torch.exp2(-k) - torch.exp2(-length))
        total = weights.sum(-1, keepdim=True)
        # A single class has the weight 2**0 - 1 = 0, and 0 / 0 would be NaN.
        weights = weights / torch.where(total == 0, 1, total)
    else:
        weights = places * (torch.exp2(length - k) - 1)
    return rows.reduce(ranking_nll(rows.student.gather(-1, order), weights), reduction)


def listnet_loss(
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
    r"""ListNet: cross-entropy between the two networks' top-one probabilities.

    .. math:: -\sum_i p_i \log q_i, \quad p = \mathrm{softmax}(t/T),\ q = \mathrm{softmax}(s/T)

    It equals KD without ``temperature**2`` plus the teacher's entropy, which is constant for the student.

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
        Nats per list. A class at ``-inf`` in both networks does not exist; at ``-inf`` in the student alone
        it makes the loss ``+inf``.
    Raises:
        ValueError: On a wrong shape or value.
        TypeError: On a wrong dtype.
    Example:
        >>> listnet_loss(torch.zeros(1, 4), torch.zeros(1, 4))  # log 4
        tensor(1.3863)

    References:
        Cao et al., Learning to Rank: From Pairwise Approach to Listwise Approach, ICML 2007.
    """
    checks.check_positive(temperature=temperature)
    rows = Rows.of(
        student_logits, teacher_logits, target, row_weight, class_dim=class_dim, ignore_index=ignore_index
    )
    p = (rows.teacher / temperature).softmax(-1)
    log_q = (rows.student / temperature).log_softmax(-1)
    # At p = 0 the term is 0; 0 * -inf would be NaN.
    return rows.reduce(-(p * torch.where(p == 0, 0, log_q)).sum(-1), reduction)
