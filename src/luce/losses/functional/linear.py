"""Losses on hidden states and their head, without materialising the logits."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ... import checks
from ...labels import UNLABELLED
from ...ops.engines import Backend
from ...ops.linear import LinearLogits, TopKLogits, linear_kd, linear_pld
from ...ops.linear.stream import Teacher
from ...ops.pld.options import Ties
from .._linear_checks import check_linear, check_rest
from .._reduce import Blocks, Reduction
from .._teacher import refuse_teacher_gradient
from .listwise import PLDPlaces

__all__ = ["linear_kd_loss", "linear_pld_loss"]


def _reduced(
    op: Callable[..., Tensor],
    student: LinearLogits,
    teacher: Teacher,
    target: Tensor | None,
    row_weight: Tensor | None,
    *,
    ignore_index: int,
    unlabelled_index: int | None,
    reduction: Reduction,
    factor: float = 1.0,
    chunk_rows: int | None,
) -> Tensor:
    """Check the common arguments, lay out the rows for the operator and reduce its result."""
    refuse_teacher_gradient("a loss on LinearLogits", "which treats the teacher as constant")
    if chunk_rows is not None:
        checks.check_count(chunk_rows=chunk_rows)
    # An expanded scalar has the shape of the logits without their memory; `Blocks` reads only the shape.
    shape_of_logits = student.hidden.new_zeros(()).expand(student.shape)
    blocks = Blocks.of(
        shape_of_logits,
        None,
        target,
        row_weight,
        class_dim=-1,
        ignore_index=ignore_index,
        unlabelled_index=unlabelled_index,
        needs_teacher=False,
    )
    flat = teacher.reshape(-1, teacher.shape[-1]) if isinstance(teacher, Tensor) else teacher.flat()
    labels = {} if unlabelled_index is None else {"target": blocks.target}
    # A gradient towards the row weights needs every row's value, so the operator must not sum them.
    summed = reduction != "none" and (row_weight is None or not row_weight.requires_grad)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def rows(weight: Tensor | None) -> Tensor:
        return op(student.flat(), flat, weight=weight, summed=summed, chunk_rows=chunk_rows, **labels)

    return blocks.reduce(rows, reduction, factor)


def linear_kd_loss(
    student: LinearLogits,
    teacher: Teacher,
    target: Tensor | None = None,
    *,
    temperature: float = 1.0,
    scale_by_temperature: bool = True,
    ignore_index: int = -100,
    row_weight: Tensor | None = None,
    reduction: Reduction = "mean",
    chunk_rows: int | None = None,
    backend: Backend = "auto",
) -> Tensor:
    r"""`luce.kd_loss` of the logits of a head, without materialising them.

    Equals ``kd_loss(student.logits(), teacher.logits(), target, class_dim=-1, ...)``. Rows are processed in
    chunks: the logits of a chunk are computed, used and freed, together with the gradients of hidden states,
    weight and bias. Memory holds one chunk and these gradients in float32.

    A teacher given as `TopKLogits` is compared class by class on the kept classes, and on all others merged
    into one class. The result is never negative and never larger than the full divergence.

    Args:
        student: Hidden states ``(N, H)`` or ``(B, T, H)`` and their head, with V classes. Its tensors receive
            the gradients that they require; a frozen head costs nothing.
        teacher: The same rows of the teacher: `LinearLogits` of as many classes (and any H), logits
            ``(N, V)`` or ``(B, T, V)``, or `TopKLogits` taken at this temperature. Receives no gradient.
        target: Class indices, ``(N,)`` or ``(B, T)``, used only to drop rows labelled `ignore_index`.
        temperature: Positive, no unit. ``math.inf`` gives the limit of `luce.kd_loss`.
        scale_by_temperature: Multiply by ``temperature**2``.
        ignore_index: Rows with this label do not count. The CPU skips them; the GPU computes them, because
            selecting rows would stall it.
        row_weight: One weight per row, at least 0; the mean divides by their sum. Rows of weight 0 are
            treated like ignored rows.
        reduction: ``"none"`` keeps the rows' shape, ``"mean"`` is per kept row, ``"sum"``. With ``"none"``
            the logits are recomputed in the backward pass.
        chunk_rows: Rows of a chunk. None takes a power of two near ``N * H / V``, at least 128, so that the
            logits of a chunk need about the memory of the hidden states.
        backend: As in `luce.kd_loss`, for the work within a chunk.
    Returns:
        Nats, float32 for 16-bit inputs.
    Raises:
        ValueError: On a wrong shape or value.
        TypeError: On a wrong dtype.
        RuntimeError: If the named backend cannot run here.
    Example:
        >>> import luce
        >>> head = torch.nn.Linear(16, 1000)
        >>> hidden, teacher_logits = torch.randn(8, 16), torch.randn(8, 1000)
        >>> student = luce.LinearLogits(hidden, head.weight, head.bias)
        >>> loss = linear_kd_loss(student, teacher_logits, temperature=2.0)
        >>> torch.testing.assert_close(loss, luce.kd_loss(head(hidden), teacher_logits, temperature=2.0))
    """
    checks.check_temperature(temperature, scale_by_temperature)
    check_linear(student, teacher)
    check_rest(teacher, "temperature", temperature)

    return _reduced(
        partial(linear_kd, temperature=temperature, backend=backend),
        student,
        teacher,
        target,
        row_weight,
        ignore_index=ignore_index,
        unlabelled_index=None,
        reduction=reduction,
        # At infinite temperature `linear_kd` returns the limit, which already contains the square.
        factor=temperature**2 if scale_by_temperature and temperature != torch.inf else 1.0,
        chunk_rows=chunk_rows,
    )


def linear_pld_loss(
    student: LinearLogits,
    teacher: Teacher,
    target: Tensor | None = None,
    *,
    teacher_temperature: float = 1.0,
    top_k: int | None = None,
    epsilon: float | None = None,
    tolerance: float | None = None,
    ties: Ties = "stable",
    ignore_index: int = -100,
    unlabelled_index: int = UNLABELLED,
    row_weight: Tensor | None = None,
    reduction: Reduction = "mean",
    chunk_rows: int | None = None,
    backend: Backend = "auto",
) -> Tensor:
    r"""`luce.pld_loss` of the logits of a head, without materialising them.

    Equals ``pld_loss(student.logits(), teacher.logits(), target, class_dim=-1, ...)``; see
    `luce.linear_kd_loss` for the computation and its memory.

    With `TopKLogits` only the kept classes have places, ranked by their logits with the label first; every
    suffix contains all other classes, unordered behind them. With the label among the kept classes this is
    exactly `luce.pld_loss` with `top_k`. A label that was not kept still has the first place, with weight 0,
    because its probability is unknown: its cross-entropy is missing, times a probability of at most
    1 / (K + 1) if the kept classes are the highest.

    Args:
        student: Hidden states ``(N, H)`` or ``(B, T, H)`` and their head, with V classes.
        teacher: The same rows of the teacher: `LinearLogits` of as many classes (and any H), logits
            ``(N, V)`` or ``(B, T, V)``, or `TopKLogits` taken at this temperature. Receives no gradient.
        target: Class indices, ``(N,)`` or ``(B, T)``.
        teacher_temperature: Positive, no unit; softens the weights only.
        top_k: As in `luce.pld_loss`, and so are `epsilon`, `tolerance` and `ties`; not with `TopKLogits`.
        ignore_index: Rows with this label do not count, see `luce.linear_kd_loss`.
        unlabelled_index: The label of rows without one.
        row_weight: One weight per row, at least 0; the mean divides by their sum.
        reduction: ``"none"``, ``"mean"`` per kept row, or ``"sum"``; see `luce.linear_kd_loss`.
        chunk_rows: Rows of a chunk, see `luce.linear_kd_loss`.
        backend: As in `luce.pld_loss`, for the work within a chunk.
    Returns:
        Nats, float32 for 16-bit inputs.
    Raises:
        ValueError: On a wrong shape or value, and on a label outside [0, V).
        TypeError: On a wrong dtype.
        RuntimeError: If the named backend cannot run here.
    Example:
        >>> import luce
        >>> head, teacher_head = torch.nn.Linear(16, 1000), torch.nn.Linear(32, 1000)
        >>> student = luce.LinearLogits(torch.randn(2, 4, 16), head.weight, head.bias)
        >>> teacher = luce.LinearLogits(torch.randn(2, 4, 32), teacher_head.weight, teacher_head.bias)
        >>> target = torch.randint(1000, (2, 4))
        >>> loss = linear_pld_loss(student, teacher, target)
        >>> unfused = luce.pld_loss(student.logits(), teacher.logits(), target, class_dim=-1)
        >>> torch.testing.assert_close(loss, unfused)

    References:
        Bassam, Zhu and Bian, PLD: A Choice-Theoretic List-Wise Knowledge Distillation, arXiv 2506.12542.
    """
    check_linear(student, teacher)
    check_rest(teacher, "teacher_temperature", teacher_temperature)
    if isinstance(teacher, TopKLogits) and not (top_k is None and epsilon is None and ties == "stable"):
        raise ValueError(
            "expected no `top_k`, no `epsilon` and ties='stable' "
            "with TopKLogits: the kept classes are the places"
        )
    places = PLDPlaces(top_k=top_k, epsilon=epsilon, tolerance=tolerance, ties=ties)
    options = places.settle(student.hidden, _dtype_holder(teacher), teacher_temperature)
    return _reduced(
        partial(linear_pld, options=options, backend=backend),
        student,
        teacher,
        target,
        row_weight,
        ignore_index=ignore_index,
        unlabelled_index=unlabelled_index,
        reduction=reduction,
        chunk_rows=chunk_rows,
    )


def _dtype_holder(teacher: Teacher) -> Tensor:
    """Return a tensor with the dtype of the teacher's logits."""
    if isinstance(teacher, LinearLogits):
        return teacher.hidden
    return teacher.logits if isinstance(teacher, TopKLogits) else teacher
