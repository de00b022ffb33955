"""PLD of rows whose order is in memory, a tile of places at a time.

The order is the caller's, or that of PyTorch's sort for rows that are too long, or too wide, for registers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...triton.math import exp, number
from ...triton.rows import load_label, rows_of, starts_of, weights_of
from ...triton.scan import nothing
from .row import choice, described, label_of, store_row
from .tiles import columns_of, load_at, of_row, places_of, scales_of, store_at, sums_before, widened


@triton.jit
def _class_at(order, o_c, place, label, place_of_label, classes, look):
    """Return the class in each place once the label has moved to the front of the order, and if it exists."""
    label, place_of_label = label[None, :, None], place_of_label[None, :, None]
    source = tl.where((label >= 0) & (place <= place_of_label), place - 1, place)
    there = (place < classes) & look[None, :, None]
    found = load_at(order, o_c, source, there & (source >= 0)).to(tl.int64)
    found = tl.where(source < 0, label, found)
    return found, there & (found >= 0) & (found < classes)


@triton.jit(do_not_specialize=["outer"])
def ranked_rows(
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
    # A cheap test for a permutation: a class that stands in the order twice changes the sum of cubes, or
    # leaves the label without a place.
    spoilt = tl.where((total != 0) & look, 1, spoilt)
    spoilt = tl.where(named & (place_of_label < 0), 1, spoilt)
    label_s, label_t = load_label(student, s_c, label, named), load_label(teacher, t_c, label, named)
    defined = described(top_s, top_t, spoilt, label, label_s, label_t, classes)
    top_t = tl.where(tl.abs(top_t) < float("inf"), top_t, 0.0)
    label = tl.where(named, label, -1)

    # From the last place to the first: the sums behind each place, and the loss.
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
            # Neighbours in memory are lanes, not places, so that stores coalesce.
            column = (tiles - 1 - back) * width + columns_of(each, width)
            inside = exists[None, :, None] & (column >= 0)
            store_at(sums, 1, column, behind, inside)
            store_at(scales, 1, column, e, inside)
    normaliser = 1.0 / alphas
    store_row(values, bound, row, exists, look, defined, loss * normaliser, w)

    if gradient is not None:
        # Other threads may read what this one has stored.
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
            # Every class is written once, also in rows that are skipped or whose order is no permutation.
            whole = (look & defined)[None, :, None]
            slope = tl.where(whole, slope, tl.where(look[None, :, None], float("nan"), 0.0))
            column = tl.where(whole, found, place.to(tl.int64))
            inside = exists[None, :, None] & (place < classes) & (column >= 0) & (column < classes)
            store_at(gradient, g_c, column, slope, inside)
