"""Losses that compare the two networks' order of each pair of classes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import checks
from ...ops._pairs import sum_over_pairs
from ...ops.engines import Backend
from ...ops.rkkd import FORMS, Form, rkkd
from ...ops.rkkd.reference import differences, nan_if_undefined, pairs_exist, widened
from .._reduce import Blocks, Reduction, Rows

__all__ = ["ranking_hinge_loss", "ranking_logistic_loss", "rkkd_loss"]

Channels = Literal["all", "top", "bottom"]
CHANNELS = ("all", "top", "bottom")


def rkkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor | None = None,
    *,
    form: Form = "tanh",
    steepness: float = 1.0,
    channels: Channels = "all",
    share: float = 0.1,
    ignore_index: int = -100,
    class_dim: int = 1,
    row_weight: Tensor | None = None,
    reduction: Reduction = "mean",
    backend: Backend = "auto",
) -> Tensor:
    r"""RKKD: one minus a differentiable Kendall tau between the class orders of teacher and student.

    .. math:: 1 - \frac{1}{P} \sum_{i < j} \tanh(k (t_i - t_j)) \tanh(k (s_i - s_j))

    over all *P* pairs of classes; `luce.ops.rkkd.rkkd` lists the other forms. Every pair has a bounded
    weight, where the gradient of KD leaves next to nothing to classes of low probability. Add it to
    another loss with `luce.WeightedSum`: alone it does not determine the size of the logits, and all forms
    except ``"clip"`` let it grow.

    Only the idea was verified in the paper. We know from a review that its main form is this product, that
    its best steepness is 100 and that it compares the ends of the order; `share` is our rule.

    Args:
        student_logits: Shape ``(N, C)``, ``(N, C, ...)`` or, with ``class_dim=-1``, ``(..., C)``.
        teacher_logits: Same shape; receives no gradient.
        target: Class indices, used only to drop rows labelled `ignore_index`: the loss does not use labels.
        form: ``"tanh"``, ``"sign_tanh"``, ``"product"``, ``"sigmoid"`` or ``"clip"``. On the CPU ``"clip"``
            takes C log C steps and each other form C squared, with memory for one row.
        steepness: *k* above 0, per logit (``"product"``: per squared logit). The larger it is, the closer the
            value is to Kendall's tau and the fewer pairs have a gradient: those within a few *1/k*. On the
            z-scores that `luce.Standardized` makes, one between 1 and 10 suits logits of any size.
        channels: Compare ``"all"`` classes, or those that the teacher ranks at the ``"top"`` or at the
            ``"bottom"`` of the row.
        share: Number of these classes: a fraction of the row's classes, rounded, or an integer count; at
            least two.
        ignore_index: Rows with this label do not count.
        class_dim: Dimension of the classes.
        row_weight: One weight per row, at least 0; the mean divides by their sum.
        reduction: ``"none"`` keeps the rows' shape, ``"mean"`` is per kept row, ``"sum"``.
        backend: ``"auto"`` chooses the fastest engine; ``"cpu"``, ``"gpu"``, ``"reference"`` require it.
    Returns:
        From 0 to 2, float32 for 16-bit logits; 1 if the orders are uncorrelated. A class excluded (``-inf``)
        in both networks does not exist; one excluded in one network lies infinitely far below the others. A
        row with a single class has no pair and the loss 0, so that classes that do not exist have no effect.
    Raises:
        ValueError: On a wrong shape or value.
        TypeError: On a wrong dtype.
    Example:
        >>> student_logits = torch.tensor([[1.2, 0.7, -0.4, 0.9]])
        >>> teacher_logits = torch.tensor([[2.0, 0.5, -1.0, 0.3]])
        >>> rkkd_loss(student_logits, teacher_logits)
        tensor(0.4940)
        >>> rkkd_loss(student_logits, teacher_logits, channels="bottom", share=3, steepness=100.0)
        tensor(0.6667)

    References:
        Guan et al., Enhancing Logits Distillation with Plug&Play Kendall's tau Ranking Loss, ICML 2025,
        arXiv 2409.17823.
    """
    checks.check_choice("form", form, FORMS)
    checks.check_positive(steepness=steepness)
    checks.check_choice("channels", channels, CHANNELS)
    checks.check_share(share)
    blocks = Blocks.of(
        student_logits, teacher_logits, target, row_weight, class_dim=class_dim, ignore_index=ignore_index
    )

    def rows(weight: Tensor | None) -> Tensor:
        s, t = blocks.student, blocks.given_teacher()
        if channels != "all":
            s, t = _end_of_the_order(s, t, channels, share)
        if s.shape[1] == 1:  # the operator raises on one class, but not with one that does not exist added
            s, t = (torch.cat([x, torch.full_like(x, -torch.inf)], 1) for x in (s, t))
        return rkkd(s, t, form=form, steepness=steepness, weight=weight, backend=backend)

    return blocks.reduce(rows, reduction)


def _end_of_the_order(s: Tensor, t: Tensor, channels: Channels, share: float) -> tuple[Tensor, Tensor]:
    """Return the logits of the classes that the teacher ranks first or last, padded with -inf."""
    absent = (s == -torch.inf) & (t == -torch.inf)
    classes = s.shape[1]
    # Classes that do not exist must rank behind those that only the teacher excludes.
    ranked = t.clamp(min=torch.finfo(t.dtype).min).masked_fill(absent, -torch.inf)
    # Stable: among equals at the cut every device must choose the lower class.
    order = ranked.argsort(dim=1, descending=True, stable=True)
    present = classes - absent.sum(1, keepdim=True)
    size = (torch.full_like(present, share) if isinstance(share, int) else (share * present).round()).long()
    most = min(classes, max(2, share if isinstance(share, int) else round(share * classes)))
    # At least 2: a single class has no pair to compare.
    size = torch.minimum(size.clamp(2, most), present)
    place = torch.arange(most, device=s.device).reshape(-1, *[1] * (s.ndim - 2))
    first = present - size if channels == "bottom" else torch.zeros_like(size)
    # Clamped since gather raises beyond the classes; places from `size` on are masked below.
    chosen = order.gather(1, (first + place).clamp(max=classes - 1))
    # Negated so that NaN, which compares False, is undefined too.
    undefined = ~((s < torch.inf) & (t < torch.inf)).all(1, keepdim=True)

    def taken(x: Tensor) -> Tensor:
        x = x.gather(1, chosen).masked_fill(place >= size, -torch.inf)
        return x.masked_fill(undefined, torch.nan)  # NaN elsewhere in the row counts too

    return taken(s), taken(t)


def ranking_hinge_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor | None = None,
    *,
    margin: float = 1.0,
    ignore_index: int = -100,
    class_dim: int = 1,
    row_weight: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Ranking hinge: in each pair, the class that the teacher prefers should lead by a margin.

    .. math:: \operatorname{mean}_{t_i > t_j} \max(0,\ m - (s_i - s_j))

    The pairwise loss of Ranking SVMs with the teacher's order instead of relevance grades. 0 once all pairs
    have their margin.

    Args:
        student_logits: Shape ``(N, C)``, ``(N, C, ...)`` or, with ``class_dim=-1``, ``(..., C)``.
        teacher_logits: Same shape; only their order counts, and equals are not compared.
        target: Class indices, used only to drop rows labelled `ignore_index`.
        margin: *m* above 0, in the student's logits.
        ignore_index: Rows with this label do not count.
        class_dim: Dimension of the classes.
        row_weight: One weight per row, at least 0; the mean divides by their sum.
        reduction: ``"none"``, ``"mean"`` per kept row, or ``"sum"``.
    Returns:
        Logits per pair, float32 for 16-bit logits; 0 for a row whose classes all tie. The C squared pairs are
        processed in blocks of classes. A class at ``-inf`` in both networks does not
        exist; at ``-inf`` in the student alone it makes the loss ``+inf``, unless it ranks last.
    Raises:
        ValueError: On a wrong shape or value.
        TypeError: On a wrong dtype.
    Example:
        >>> ranking_hinge_loss(torch.tensor([[0.5, 0.0, 2.0]]), torch.tensor([[3.0, 2.0, 2.0]]))
        tensor(1.5000)

    References:
        Herbrich, Graepel and Obermayer, Large Margin Rank Boundaries for Ordinal Regression, 2000.
    """
    checks.check_positive(margin=margin)
    rows = Rows.of(
        student_logits, teacher_logits, target, row_weight, class_dim=class_dim, ignore_index=ignore_index
    )
    return rows.reduce(_mean_over_ordered_pairs(rows, lambda lead: (margin - lead).clamp(min=0)), reduction)


def ranking_logistic_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor | None = None,
    *,
    steepness: float = 1.0,
    ignore_index: int = -100,
    class_dim: int = 1,
    row_weight: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Ranking logistic: in each pair, the student should choose the class that the teacher prefers.

    .. math:: \operatorname{mean}_{t_i > t_j} \log\big(1 + e^{-k (s_i - s_j)}\big)

    The pairwise loss of RankNet with the teacher's order instead of relevance grades: cross-entropy of the
    choice between two classes. Convex in the student's logits, without a finite minimum.

    Args:
        student_logits: Shape ``(N, C)``, ``(N, C, ...)`` or, with ``class_dim=-1``, ``(..., C)``.
        teacher_logits: Same shape; only their order counts, and equals are not compared.
        target: Class indices, used only to drop rows labelled `ignore_index`.
        steepness: *k* above 0, per logit.
        ignore_index: Rows with this label do not count.
        class_dim: Dimension of the classes.
        row_weight: One weight per row, at least 0; the mean divides by their sum.
        reduction: ``"none"``, ``"mean"`` per kept row, or ``"sum"``.
    Returns:
        Nats per pair, float32 for 16-bit logits; 0 for a row whose classes all tie. Pairs and classes at
        ``-inf`` as in `ranking_hinge_loss`.
    Raises:
        ValueError: On a wrong shape or value.
        TypeError: On a wrong dtype.
    Example:
        >>> ranking_logistic_loss(torch.tensor([[0.6, 0.8]]), torch.tensor([[1.0, 0.0]]))  # log(1 + e**0.2)
        tensor(0.7981)

    References:
        Burges et al., Learning to Rank using Gradient Descent, ICML 2005.
    """
    checks.check_positive(steepness=steepness)
    rows = Rows.of(
        student_logits, teacher_logits, target, row_weight, class_dim=class_dim, ignore_index=ignore_index
    )
    # logsigmoid: in float32 log(1 + exp(-x)) overflows below -88.
    return rows.reduce(
        _mean_over_ordered_pairs(rows, lambda lead: -F.logsigmoid(steepness * lead)), reduction
    )


def _mean_over_ordered_pairs(rows: Rows, cost: Callable[[Tensor], Tensor]) -> Tensor:
    """Return the mean of ``cost(s_i - s_j)`` over pairs in which the teacher prefers i; 0 without any."""
    s, t = widened(rows.student), widened(rows.teacher)

    def part(s: Tensor, t: Tensor, first: int, count: int) -> Tensor:
        counts = (differences(t, first, count) > 0) & pairs_exist(s, t, first, count)
        costs = torch.where(counts, cost(differences(s, first, count)), 0)
        return torch.stack([costs.sum((1, 2)), counts.sum((1, 2)).to(s.dtype)])

    total, pairs = sum_over_pairs(part, s, t)
    # A teacher that ranks all classes equal has no pair: the loss is 0, where 0 / 0 would be NaN.
    return nan_if_undefined(total / pairs.clamp(min=1), s, t).to(rows.student.dtype)
