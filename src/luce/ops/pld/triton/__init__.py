"""PLD in Triton; csrc/kernels/pld.cpp has the notation.

`sorted`: rows that fit into the registers of a program are sorted there, and evaluated in the same visit.
`ranked`: longer rows, rows of float64 and rows with a given order. It reads the order from memory, where a
sort of PyTorch's may have left it, and walks over the places a tile at a time. `top_k`: the first places of
long rows, without a sort.

A sum of exponentials is a mantissa times e^scale. The scale is the largest logit from a place on: a suffix
keeps its digits, however far it lies below the row's top.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...fused import empty_results
from ...triton.launch import check_rows, launch, split_number, strides, tile, wide_type
from ..options import PldOptions
from . import top_k
from .ranked import ranked_rows
from .sorted import sorted_rows

LONGEST = 4096
"""The most classes of a row that is sorted in registers: eight warps, and half a minute to compile."""

EACH = 16
"""Places that a thread sorts. With more, registers spill; with fewer, threads exchange more."""

LARGEST = 2**25
"""Logits whose order is in memory at a time: the order, PyTorch's sort and the scratch of a gradient take
about 40 bytes of each. This leaves more than 128 rows of 200,000 classes; for fewer, PyTorch takes a slower
sort."""


def pld(
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None,
    weight: Tensor | None,
    order: Tensor | None,
    *settings: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Values, bound and gradient; `settings` are the fields of `PldOptions`, then `needs_gradient`."""
    options, needs_gradient = PldOptions(*settings[:-1]), bool(settings[-1])  # type: ignore[arg-type]
    check_rows(student, teacher, target=target, weight=weight)
    if options.average_ties or options.epsilon:
        raise RuntimeError("there is no Triton kernel for ties='average' and for epsilon")
    if order is not None and (order.shape != student.shape or order.dtype not in (torch.int64, torch.int32)):
        raise RuntimeError("expected `order` of the logits' shape, int64 or int32")
    values, gradient = empty_results(student, teacher, needs_gradient)
    bound = values.new_empty(values.numel(), 2)
    asked = gradient if needs_gradient else None
    classes, wide = student.shape[1], wide_type(student, teacher)
    places = min(options.top_k, classes)
    unordered = order is None and wide == tl.float32
    if unordered and classes > LONGEST and places < classes and top_k.fits(student, places):
        tensors = (student, teacher, target, weight, values, bound, asked)
        top_k.first_k(*tensors, places, options.teacher_temperature)
        return values, bound, gradient
    numbers = [places, *split_number(1 / options.teacher_temperature)]
    if unordered and classes <= LONGEST:
        launch(
            sorted_rows,
            student,
            *(student, teacher, target, weight, values, bound, asked),
            after=[*strides(student), *strides(teacher), *strides(asked), *numbers],
            whole_rows=True,
            most=32 * EACH,
            per_warp=32 * EACH,
            each=min(EACH, triton.next_power_of_2(classes)),
            wide=wide,
        )
        return values, bound, gradient
    each = 4 if wide == tl.float64 else 8  # a place in float64 takes the registers of two in float32
    row_tensors = [None if x is None else x.view(values.shape) for x in (target, weight)]
    for rows, part in _parts(student):
        s, t = student[part], teacher[part]
        given = t.sort(dim=1, descending=True, stable=True).indices if order is None else order[part]
        labels, weights = [None if x is None else x[rows] for x in row_tensors]
        width = tile(s, most=128 * each)[1]
        scratch = (*s.shape[::2], triton.cdiv(classes, width) * width)
        sums = [values.new_empty(scratch) if needs_gradient else None for _ in range(2)]
        launch(
            ranked_rows,
            s,
            *(s, t, labels, given, weights, values[rows], bound.view(*values.shape, 2)[rows]),
            *(None if asked is None else asked[part], *sums),
            after=[*strides(s), *strides(t), *strides(given), *strides(asked), *numbers],
            most=128 * each,
            per_warp=32 * each,
            each=min(each, max(1, triton.next_power_of_2(classes) // 32)),
            wide=wide,
        )
    return values, bound, gradient


def _parts(logits: Tensor) -> Iterator[tuple[tuple[slice, ...], tuple[slice, ...]]]:
    """Yield rows to process together, as an index into one number a row and as one into logits."""
    outer, classes, inner = (*logits.shape, 1)[:3]
    step = max(1, LARGEST // max(1, classes * inner))
    step_inside = max(1, inner if classes * inner <= LARGEST else LARGEST // classes)
    for n in range(0, outer, step):
        for m in range(0, inner, step_inside):
            rows = (slice(n, n + step), slice(m, m + step_inside))[: logits.ndim - 1]
            yield rows, (rows[0], slice(None), *rows[1:])
