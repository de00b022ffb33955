"""PLD of rows that fit into the registers of a program: they are sorted and evaluated in one visit."""

from __future__ import annotations

import triton
import triton.language as tl

from ...triton.math import exp, number
from ...triton.rows import load_label, rows_of, starts_of, weights_of
from ...triton.scan import nothing
from .row import choice, described, label_of, store_row
from .tiles import (
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


@triton.jit(do_not_specialize=["outer"])
def sorted_rows(
    student, teacher, target, weight, values, bound, gradient, outer, classes, inner,
    s_n, s_c, s_m, t_n, t_c, t_m, g_n, g_c, g_m, places, softness_high, softness_low,
    height: tl.constexpr, width: tl.constexpr, each: tl.constexpr, wide: tl.constexpr,
):  # fmt: skip
    """One program sorts whole rows; nothing but logits, values and gradient passes through memory."""
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
