"""PLD in Triton; csrc/kernels/pld.cpp has the notation.

Rows that fit into the registers of a program are sorted there, and all else is done in the same visit.
Longer rows, rows of float64, and rows whose order is known go through a second kernel: it takes the order
from memory, where a sort of PyTorch's may have left it, and walks over the places a tile at a time.

A sum of exponentials is a mantissa times e^scale. The scale is the largest logit from a place on: a suffix
keeps its digits, however far it lies below the row's top.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton import (
    check_rows,
    exp,
    launch,
    load_label,
    number,
    rows_of,
    split_number,
    starts_of,
    strides,
    tile,
    weights_of,
    wide_type,
)
from .._triton_scan import nothing
from ..fused import empty_results
from .gpu_row import choice, described, label_of, store_row
from .gpu_tiles import (
    columns_of,
    in_order,
    key_of,
    load_at,
    logit_and_class,
    of_row,
    places_of,
    scales_of,
    store_at,
    sums_before,
    widened,
)

LONGEST = 4096
"""The most classes of a row that is sorted in registers: eight warps, and half a minute to compile."""

EACH = 16
"""Places that a thread holds when it sorts. More spill registers, fewer are more work between threads."""

LARGEST = 2**25
"""Logits whose order is in memory at a time: it, PyTorch's sort and what a gradient needs take about 40 bytes
of each. This leaves more than 128 rows of 200,000 classes; fewer PyTorch would sort in a slower way."""


@triton.jit(do_not_specialize=["outer"])
def _sorted(
    student, teacher, target, weight, values, bound, gradient, outer, classes, inner,
    s_n, s_c, s_m, t_n, t_c, t_m, g_n, g_c, g_m, places, softness_high, softness_low,
    height: tl.constexpr, width: tl.constexpr, each: tl.constexpr, wide: tl.constexpr,
):  # fmt: skip
    row, n, m, exists = rows_of(outer, inner, height)
    w = weights_of(weight, row, exists)
    look = w != 0.0
    student = starts_of(student, n, m, s_n, s_m)
    teacher = starts_of(teacher, n, m, t_n, t_m)
    softness = number(softness_high, softness_low).to(wide)
    label = label_of(target, row, look)
    named = look & (label >= 0) & (label < classes)

    column = columns_of(each, width)
    there = (column < classes) & look[None, :, None]
    s = widened(load_at(student, s_c, column, there), column < classes, wide)
    t_own = load_at(teacher, t_c, column, there)
    t = widened(t_own, column < classes, wide)
    top_s, top_t = of_row(s, True), of_row(t, True)
    spoilt = of_row(((s != s) | (t != t)).to(tl.int32), True)
    label_s, label_t = load_label(student, s_c, label, named), load_label(teacher, t_c, label, named)
    defined = described(top_s, top_t, spoilt, label, label_s, label_t, classes)
    top_t = tl.where(tl.abs(top_t) < float("inf"), top_t, 0.0)

    key = in_order(key_of(t_own, column, classes, column == label[None, :, None]), height, width)
    t, place = logit_and_class(key, t_own.dtype)
    there = (place < classes) & look[None, :, None]
    t = widened(t, there, wide)
    t = tl.where(place == label[None, :, None], label_t.to(wide)[None, :, None], t)
    s = widened(load_at(student, s_c, place, there), there, wide)

    alpha = exp((t - top_t[None, :, None]) * softness)
    normaliser = 1.0 / of_row(alpha, False).to(tl.float64)
    alpha = tl.where(places_of(each, width) < places, alpha, 0.0)
    zero = tl.zeros([height], wide)
    e = scales_of(s, nothing(zero))
    own = exp(s - e)
    behind, _, _ = sums_before(own, e, zero, nothing(zero), True)
    part, ratio, of_rest = choice(s, alpha, own, behind, e)
    loss = of_row(part, False).to(tl.float64) * normaliser
    store_row(values, bound, row, exists, look, defined, loss, w)

    if gradient is not None:
        gradient = starts_of(gradient, n, m, g_n, g_m)
        before, _, _ = sums_before(ratio, e, zero, nothing(zero), False)
        factor = (tl.where(defined, w, float("nan")) * normaliser).to(wide)
        slope = (own * before - of_rest) * factor[None, :, None]
        slope = tl.where(look[None, :, None], slope, 0.0)
        store_at(gradient, g_c, place, slope, exists[None, :, None] & (place < classes))


@triton.jit
def _class_at(order, o_c, place, label, place_of_label, classes, look):
    """The class in a place, the label having gone to the front of the given order."""
    label, place_of_label = label[None, :, None], place_of_label[None, :, None]
    source = tl.where((label >= 0) & (place <= place_of_label), place - 1, place)
    there = (place < classes) & look[None, :, None]
    found = load_at(order, o_c, source, there & (source >= 0)).to(tl.int64)
    found = tl.where(source < 0, label, found)
    return found, there & (found >= 0) & (found < classes)


@triton.jit(do_not_specialize=["outer"])
def _ranked(
    student, teacher, target, order, weight, values, bound, gradient, sums, scales,
    outer, classes, inner,
    s_n, s_c, s_m, t_n, t_c, t_m, o_n, o_c, o_m, g_n, g_c, g_m, places, softness_high, softness_low,
    height: tl.constexpr, width: tl.constexpr, each: tl.constexpr, wide: tl.constexpr,
):  # fmt: skip
    row, n, m, exists = rows_of(outer, inner, height)
    w = weights_of(weight, row, exists)
    look = w != 0.0
    student = starts_of(student, n, m, s_n, s_m)
    teacher = starts_of(teacher, n, m, t_n, t_m)
    order = starts_of(order, n, m, o_n, o_m)
    softness = number(softness_high, softness_low).to(wide)
    label = label_of(target, row, look)
    named = look & (label >= 0) & (label < classes)

    top_s = tl.full([height], float("-inf"), wide)
    top_t = tl.full([height], float("-inf"), wide)
    spoilt = tl.zeros([height], tl.int32)
    place_of_label = tl.full([height], -1, tl.int64)
    total = tl.zeros([height], tl.int64)
    for start in range(0, classes, width):
        column = start + columns_of(each, width)
        there = (column < classes) & look[None, :, None]
        s = widened(load_at(student, s_c, column, there), there, wide)
        t = widened(load_at(teacher, t_c, column, there), there, wide)
        top_s = tl.maximum(top_s, of_row(s, True))
        top_t = tl.maximum(top_t, of_row(t, True))
        given = load_at(order, o_c, column, there).to(tl.int64)
        wrong = (s != s) | (t != t) | (s == float("inf")) | (t == float("inf"))
        wrong = wrong | (given < 0) | (given >= classes)
        spoilt = tl.maximum(spoilt, of_row(wrong.to(tl.int32), True))
        column = column.to(tl.int64)
        here = tl.where(there & (given == label[None, :, None]), column, -1)
        place_of_label = tl.maximum(place_of_label, of_row(here, True))
        total += of_row(tl.where(there, given * given * given - column * column * column, 0), False)
    # Classes that stand in the order twice leave another sum of cubes, or a label that stands nowhere.
    spoilt = tl.where((total != 0) & look, 1, spoilt)
    spoilt = tl.where(named & (place_of_label < 0), 1, spoilt)
    label_s, label_t = load_label(student, s_c, label, named), load_label(teacher, t_c, label, named)
    defined = described(top_s, top_t, spoilt, label, label_s, label_t, classes)
    top_t = tl.where(tl.abs(top_t) < float("inf"), top_t, 0.0)
    label = tl.where(named, label, -1)

    # From the last place to the first: sums of what is behind, and the loss.
    tiles = tl.cdiv(classes, width)
    if gradient is not None:
        sums, scales = sums + row * (tiles * width), scales + row * (tiles * width)
    loss = tl.zeros([height], tl.float64)
    alphas = tl.zeros([height], tl.float64)
    carry = tl.zeros([height], wide)
    e_carry = nothing(carry)
    for back in range(0, tiles):
        place = (tiles - 1 - back) * width + places_of(each, width)
        found, there = _class_at(order, o_c, place, label, place_of_label, classes, look)
        s = widened(load_at(student, s_c, found, there), there, wide)
        t = widened(load_at(teacher, t_c, found, there), there, wide)
        alpha = exp((t - top_t[None, :, None]) * softness)
        alphas += of_row(alpha, False).to(tl.float64)
        alpha = tl.where(place < places, alpha, 0.0)
        e = scales_of(s, e_carry)
        own = exp(s - e)
        behind, carry, e_carry = sums_before(own, e, carry, e_carry, True)
        part, _, _ = choice(s, alpha, own, behind, e)
        loss += of_row(part, False).to(tl.float64)
        if gradient is not None:
            # Side by side in memory is what the lanes hold, not the places.
            column = (tiles - 1 - back) * width + columns_of(each, width)
            inside = exists[None, :, None] & (column >= 0)
            store_at(sums, 1, column, behind, inside)
            store_at(scales, 1, column, e, inside)
    normaliser = 1.0 / alphas
    store_row(values, bound, row, exists, look, defined, loss * normaliser, w)

    if gradient is not None:
        # What was stored is read again, perhaps by other threads.
        tl.debug_barrier()
        gradient = starts_of(gradient, n, m, g_n, g_m)
        factor = (tl.where(defined, w, float("nan")) * normaliser).to(wide)[None, :, None]
        carry = tl.zeros([height], wide)
        e_carry = nothing(carry)
        for start in range(0, classes, width):
            place = start + places_of(each, width)
            found, there = _class_at(order, o_c, place, label, place_of_label, classes, look)
            s = widened(load_at(student, s_c, found, there), there, wide)
            t = widened(load_at(teacher, t_c, found, there), there, wide)
            alpha = exp((t - top_t[None, :, None]) * softness)
            alpha = tl.where(place < places, alpha, 0.0)
            column = start + columns_of(each, width)
            inside = exists[None, :, None] & (column >= 0)
            behind, e = load_at(sums, 1, column, inside), load_at(scales, 1, column, inside)
            own = exp(s - e)
            _, ratio, of_rest = choice(s, alpha, own, behind, e)
            before, carry, e_carry = sums_before(ratio, e, carry, e_carry, False)
            slope = (own * before - of_rest) * factor
            # Every class once, also in rows that are not looked at or whose order is none.
            whole = (look & defined)[None, :, None]
            slope = tl.where(whole, slope, tl.where(look[None, :, None], float("nan"), 0.0))
            column = tl.where(whole, found, place.to(tl.int64))
            inside = exists[None, :, None] & (place < classes) & (column >= 0) & (column < classes)
            store_at(gradient, g_c, column, slope, inside)


def pld(
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None,
    weight: Tensor | None,
    order: Tensor | None,
    teacher_temperature: float,
    top_k: int,
    epsilon: float,
    tolerance: float,
    average_ties: bool,
    needs_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    check_rows(student, teacher, target=target, weight=weight)
    if average_ties or epsilon:
        raise RuntimeError("there is no Triton kernel for ties='average' and for epsilon")
    if order is not None and (order.shape != student.shape or order.dtype not in (torch.int64, torch.int32)):
        raise RuntimeError("expected `order` of the logits' shape, int64 or int32")
    values, gradient = empty_results(student, teacher, needs_gradient)
    bound = values.new_empty(values.numel(), 2)
    asked = gradient if needs_gradient else None
    of_gradient = strides(asked) if asked is not None else (0, 0, 0)
    classes, wide = student.shape[1], wide_type(student, teacher)
    if order is None and classes > LONGEST and top_k < classes and wide == tl.float32:
        from . import gpu_top_k

        if gpu_top_k.fits(student, top_k):
            tensors = (student, teacher, target, weight, values, bound, asked)
            gpu_top_k.first_k(*tensors, top_k, teacher_temperature)
            return values, bound, gradient
    numbers = [min(top_k, classes), *split_number(1 / teacher_temperature)]
    if order is None and classes <= LONGEST and wide == tl.float32:
        launch(
            _sorted,
            student,
            *(student, teacher, target, weight, values, bound, asked),
            after=[*strides(student), *strides(teacher), *of_gradient, *numbers],
            whole_rows=True,
            most=32 * EACH,
            per_warp=32 * EACH,
            each=min(EACH, triton.next_power_of_2(classes)),
            wide=wide,
        )
        return values, bound, gradient
    each = 4 if wide == tl.float64 else 8
    row_tensors = [None if x is None else x.view(values.shape) for x in (target, weight)]
    for rows, part in _parts(student):
        some, theirs = student[part], teacher[part]
        given = theirs.sort(dim=1, descending=True, stable=True).indices if order is None else order[part]
        labels, weights = [None if x is None else x[rows] for x in row_tensors]
        width = tile(some, most=128 * each)[1]
        scratch = (*some.shape[::2], triton.cdiv(classes, width) * width)
        sums = [values.new_empty(scratch) if needs_gradient else None for _ in range(2)]
        launch(
            _ranked,
            some,
            *(some, theirs, labels, given, weights, values[rows], bound.view(*values.shape, 2)[rows]),
            *(None if asked is None else asked[part], *sums),
            after=[*strides(some), *strides(theirs), *strides(given), *of_gradient, *numbers],
            most=128 * each,
            per_warp=32 * each,
            each=min(each, max(1, triton.next_power_of_2(classes) // 32)),
            wide=wide,
        )
    return values, bound, gradient


def _parts(logits: Tensor) -> Iterator[tuple[tuple[slice, ...], tuple[slice, ...]]]:
    """Rows to look at together, as an index for what has one number a row, and for logits."""
    outer, classes, inner = (*logits.shape, 1)[:3]
    step = max(1, LARGEST // max(1, classes * inner))
    step_inside = max(1, inner if classes * inner <= LARGEST else LARGEST // classes)
    for n in range(0, outer, step):
        for m in range(0, inner, step_inside):
            rows = (slice(n, n + step), slice(m, m + step_inside))[: logits.ndim - 1]
            yield rows, (rows[0], slice(None), *rows[1:])
