"""Losses on hidden states and the head that would make logits of them: the logits are never held at once."""

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
from .listwise import _pld_options

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
    """Check what both losses share, lay the rows out for the operator and reduce what it gives."""
    refuse_teacher_gradient("a loss on LinearLogits", "which takes the teacher for constant")
    if chunk_rows is not None:
        checks.check_count(chunk_rows=chunk_rows)
    # Rows, weights and labels are those of logits: here is one number that has their shape and no memory.
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
    r"""`luce.kd_loss` of the logits that a head would give, without holding them.

    The same as ``kd_loss(student.logits(), teacher.logits(), target, class_dim=-1, ...)``. Rows are visited
    in chunks: their logits are made, looked at and dropped, and the gradients towards hidden states, weight
    and bias are computed in the same visit. So memory is for a chunk, and for these gradients in float32.

    A teacher of which only `TopKLogits` are left is compared class by class on those, and on all others as
    one class, as both networks' distributions see it. This is never negative, and never larger than the full
    divergence.

    Args:
        student: Hidden states ``(N, H)`` or ``(B, T, H)`` and their head, with V classes. Ask for its
            gradient by what its tensors require; a frozen head costs nothing.
        teacher: The same rows of the teacher: `LinearLogits` of as many classes (and any H), logits
            ``(N, V)`` or ``(B, T, V)``, or `TopKLogits` taken at this temperature. Receives no gradient.
        target: Class indices, ``(N,)`` or ``(B, T)``, used only to drop rows labelled `ignore_index`.
        temperature: Positive, no unit. ``math.inf`` is `luce.kd_loss`'s limit.
        scale_by_temperature: Multiply by ``temperature**2``.
        ignore_index: Rows with this label do not count. Nothing is computed for them on a CPU; a GPU is not
            asked which they are, as that would stall it.
        row_weight: One weight per row, at least 0; the mean divides by their sum. Rows of weight 0 are like
            rows that do not count.
        reduction: ``"none"`` keeps the rows' shape, ``"mean"`` is per kept row, ``"sum"``. With ``"none"``
            the logits are computed once more on the way back.
        chunk_rows: Rows of a chunk. None takes a power of two near ``N * H / V``, so that a chunk's logits
            take about what the hidden states take, and at least 128.
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
    r"""`luce.pld_loss` of the logits that a head would give, without holding them.

    The same as ``pld_loss(student.logits(), teacher.logits(), target, class_dim=-1, ...)``; how it is
    computed, and what memory it takes, says `luce.linear_kd_loss`.

    Of `TopKLogits` the kept classes, ranked by their logits with the label first, are the places that count;
    every suffix keeps all other classes, unordered behind them. With the label among them this is exactly
    `luce.pld_loss` with `top_k`. A label that was not kept still goes first, but with weight 0, as the
    teacher did not say its own: so its cross-entropy is missing, times a probability that is at most
    1 / (K + 1) if the kept are the highest.

    Args:
        student: Hidden states ``(N, H)`` or ``(B, T, H)`` and their head, with V classes.
        teacher: The same rows of the teacher: `LinearLogits` of as many classes (and any H), logits
            ``(N, V)`` or ``(B, T, V)``, or `TopKLogits` taken at this temperature. Receives no gradient.
        target: Class indices, ``(N,)`` or ``(B, T)``.
        teacher_temperature: Positive, no unit; softens the weights only.
        top_k: As in `luce.pld_loss`, and so are `epsilon`, `tolerance` and `ties`; not with `TopKLogits`.
        ignore_index: Rows with this label do not count, see `luce.linear_kd_loss`.
        unlabelled_index: Rows with this label have none.
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
            "expected no `top_k`, no `epsilon` and ties='stable' with TopKLogits: what was kept counts"
        )
    options = _pld_options(
        student.hidden, _dtype_holder(teacher), teacher_temperature, top_k, epsilon, tolerance, ties
    )
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
    """A tensor of the precision that the teacher's logits come in."""
    if isinstance(teacher, LinearLogits):
        return teacher.hidden
    return teacher.logits if isinstance(teacher, TopKLogits) else teacher
