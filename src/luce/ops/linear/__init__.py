"""Losses on the logits of a linear head, one value per row, without holding all these logits.

The student comes as `LinearLogits`; the teacher likewise, as plain logits ``(N, V)`` or as `TopKLogits`. All
are rows, ``(N, ...)``. `target` and `weight` are those of the operators on logits, which process a chunk of
rows. The teacher gets no gradient.

Gradients towards hidden states, weight and bias are summed in float32 (float64 for float64) and rounded once,
to the dtype of each. With `summed` they are computed with the values, and the backward pass costs one
multiplication; otherwise the backward pass computes the logits again. Both process a chunk at a time. Only
the derivative of a gradient, and `torch.func`, hold all logits.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..kd import forward_kl, kl_limit
from ..pld import EXACT, PldOptions, pld
from .logits import LinearLogits, TopKLogits
from .stream import FEWEST_ROWS, Formula, Job, Teacher, autocast_dtype, rows_per_chunk
from .top_k import few_classes, few_places

__all__ = ["FEWEST_ROWS", "LinearLogits", "TopKLogits", "linear_kd", "linear_pld", "rows_per_chunk"]


def _job(
    student: LinearLogits, teacher: Teacher, target: Tensor | None, formula: Formula, chunk_rows: int | None
) -> Job:
    if isinstance(teacher, TopKLogits):
        other = torch.promote_types(teacher.logits.dtype, teacher.rest.dtype)
    else:
        other = (teacher.hidden if isinstance(teacher, LinearLogits) else teacher).dtype
    dtype = torch.promote_types(torch.promote_types(student.hidden.dtype, torch.float32), other)
    autocast = autocast_dtype(student.hidden.device)
    return Job(student, teacher, target, formula, dtype, chunk_rows, autocast)


def linear_kd(
    student: LinearLogits,
    teacher: Teacher,
    temperature: float,
    *,
    weight: Tensor | None = None,
    summed: bool = False,
    chunk_rows: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """Return KL(teacher || student) at a temperature, or `luce.ops.kd.kl_limit` at infinity.

    `TopKLogits` must have this temperature; the distributions then are over their classes and one class for
    all others.

    Example:
        >>> student = LinearLogits(torch.tensor([[1.0]]), torch.tensor([[0.5], [-1.0], [2.0], [0.3]]))
        >>> teacher = torch.tensor([[2.0, 1.0, 0.1, -1.0]])
        >>> linear_kd(student, teacher, 4.0)
        tensor([0.0888])
        >>> linear_kd(student, TopKLogits.of(teacher, 2, temperature=4.0), 4.0)
        tensor([0.0878])
    """

    def formula(s: Tensor, t: Tensor | TopKLogits, labels: Tensor | None, weight: Tensor | None) -> Tensor:
        if isinstance(t, TopKLogits):
            s, t = few_classes(s, t, temperature)
        if temperature == math.inf:
            return kl_limit(s, t, weight=weight, backend=backend)
        return forward_kl(s, t, temperature, weight=weight, backend=backend)

    return _job(student, teacher, None, formula, chunk_rows).values(weight, summed)


def linear_pld(
    student: LinearLogits,
    teacher: Teacher,
    target: Tensor | None = None,
    *,
    options: PldOptions = EXACT,
    weight: Tensor | None = None,
    summed: bool = False,
    chunk_rows: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """Return `luce.ops.pld.pld` of the logits.

    With `TopKLogits` the kept classes are the places that count, and all others follow unordered; the only
    option is the teacher's temperature, which must be theirs. A label that was not kept still comes first,
    without a weight.

    Example:
        >>> student = LinearLogits(torch.tensor([[1.0]]), torch.tensor([[0.5], [-1.0], [2.0], [0.3]]))
        >>> teacher, target = torch.tensor([[2.0, 1.0, 0.1, -1.0]]), torch.tensor([2])
        >>> linear_pld(student, teacher, target)
        tensor([0.8530])
        >>> linear_pld(student, TopKLogits.of(teacher, 2, target), target)  # is pld with top_k=2
        tensor([0.4913])
    """

    def formula(s: Tensor, t: Tensor | TopKLogits, labels: Tensor | None, weight: Tensor | None) -> Tensor:
        order = None
        if isinstance(t, TopKLogits):
            s, t, order, labels = few_places(s, t, labels)
        return pld(s, t, labels, weight=weight, order=order, options=options, backend=backend)

    return _job(student, teacher, target, formula, chunk_rows).values(weight, summed)
