"""PLD in Triton; csrc/kernels/pld.cpp has the notation.

Rows that fit into the registers of a program are sorted there, and all else is done in the same visit.
Longer rows, rows of float64, and rows whose order is known go through a second kernel: it takes the order
from memory, where a sort of PyTorch's may have left it, and walks over the places a tile at a time.

A sum of exponentials is a pair, mantissa * e^scale, whose scale is the largest logit in it: a suffix keeps
its digits, however far it lies below the row's top.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._fused import empty_results
from .._triton import (
    check_rows,
    exp,
    launch,
    load_label,
    load_logits,
    log,
    minus_log,
    narrowed,
    number,
    rows_of,
    split_number,
    starts_of,
    strides,
    weights_of,
    wide_type,
)
from .._triton_scan import add as _add
from .._triton_scan import at as _at
from .._triton_scan import nothing as _nothing
from .._triton_scan import prefixes as _prefixes
from .._triton_scan import suffixes as _suffixes

LONGEST = 2048
"""The most classes of a row that is sorted in registers. Twice as many could be, but compile for minutes."""


@triton.jit
def _choice(s, alpha, m, e, behind, e_behind):
    """One place: the pair (m, e) holds the sum from its class on, the other that of the classes behind it.

    Returns:
        The place's part in the loss, alpha/Z as a pair (its scale is -e), and alpha times the others' share.
    """
    nothing = m == 0.0
    over = 1.0 / tl.where(nothing, 1.0, m)
    x = s - e
    p = exp(x) * over
    rest = tl.where(nothing, 1.0, behind * over * exp(e_behind - e))
    near = x > -60.0
    nll = tl.where(near, minus_log(tl.where(near, p, 1.0), rest), log(tl.where(nothing, 1.0, m)) - x)
    counts = alpha > 0.0
    nll = tl.where(s == float("-inf"), float("inf"), nll)
    part = tl.where(counts, alpha * tl.where(counts, nll, 0.0), 0.0)
    return part, tl.where(nothing, 0.0, alpha * over), alpha * rest


@triton.jit
def _slope(s, there, ratios, scale, of_rest):
    """The gradient at a place, from the sum of alpha/Z over all places before it."""
    seen = tl.where(there & (s > float("-inf")) & (ratios > 0.0), ratios * exp(s + scale), 0.0)
    return seen - of_rest


@triton.jit
def _described(top_s, top_t, spoilt, label, label_s, label_t, classes):
    """Whether a row has a meaning: no NaN, no +inf, networks with classes, and a label that exists."""
    inf = float("inf")
    excluded = (label_s == -inf) & (label_t == -inf)
    label_exists = (label == -1) | ((label >= 0) & (label < classes) & (excluded == 0))
    return (spoilt == 0) & (tl.abs(top_s) < inf) & (tl.abs(top_t) < inf) & label_exists


@triton.jit
def _label_of(target, row, look):
    if target is None:
        label = tl.where(look, -1, -1).to(tl.int64)
    else:
        label = tl.load(target + row, mask=look, other=-1)
    return label


@triton.jit
def _load_at(starts, class_stride, place, there, wide: tl.constexpr):
    x = tl.load(starts[:, None] + place * class_stride, mask=there, other=0.0)
    if x.dtype.primitive_bitwidth == 16:
        x = x.to(tl.float32)
    return tl.where(there, x.to(wide), float("-inf"))


@triton.jit
def _store_row(values, bound, row, exists, look, defined, loss, w):
    value = tl.where(look, tl.where(defined, loss, float("nan")) * w, 0.0)
    tl.store(values + row, value, mask=exists)
    nothing = tl.where(look & (defined == 0), float("nan"), 0.0)
    tl.store(bound + 2 * row, nothing, mask=exists)
    tl.store(bound + 2 * row + 1, nothing, mask=exists)


@triton.jit
def _keys(t, column, label):
    """Numbers that rise where the teacher's logits fall, the label's lowest; the lower half is the class."""
    bits = tl.where(t == 0.0, 0.0, t).to(tl.int32, bitcast=True)  # zeros of both signs are equal
    rising = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    key = tl.where(column[None, :] == label[:, None], -2147483648, ~rising)
    return (key.to(tl.int64) << 32) | column[None, :].to(tl.int64)


@triton.jit
def _sorted(
    student, teacher, target, weight, values, bound, gradient, outer, classes, inner,
    s_n, s_c, s_m, t_n, t_c, t_m, g_n, g_c, g_m, places, softness_high, softness_low,
    height: tl.constexpr, width: tl.constexpr, wide: tl.constexpr,
):  # fmt: skip
    row, n, m, exists = rows_of(outer, inner, height)
    w = weights_of(weight, row, exists)
    look = w != 0.0
    student = starts_of(student, n, m, s_n, s_m)
    teacher = starts_of(teacher, n, m, t_n, t_m)
    softness = number(softness_high, softness_low).to(wide)
    label = _label_of(target, row, look)
    named = look & (label >= 0) & (label < classes)

    column = tl.arange(0, width)
    s = load_logits(student, s_c, column, classes, look, wide)
    t = load_logits(teacher, t_c, column, classes, look, wide)
    top_s, top_t = tl.max(s, 1), tl.max(t, 1)
    spoilt = tl.max(((s != s) | (t != t)).to(tl.int32), 1)
    label_s, label_t = load_label(student, s_c, label, named), load_label(teacher, t_c, label, named)
    defined = _described(top_s, top_t, spoilt, label, label_s, label_t, classes)
    top_t = tl.where(tl.abs(top_t) < float("inf"), top_t, 0.0)

    key = tl.sort(_keys(t, column, label), 1)
    place = key & 0xFFFFFFFF
    there = (place < classes) & look[:, None]
    s = _load_at(student, s_c, place, there, wide)
    t = _load_at(teacher, t_c, place, there, wide)

    alpha = exp((t - top_t[:, None]) * softness)
    normaliser = 1.0 / tl.sum(alpha, 1).to(tl.float64)
    alpha = tl.where(column[None, :] < places, alpha, 0.0)
    z, e, behind, e_behind = _suffixes(s, there)
    part, ratio, of_rest = _choice(s, alpha, z, e, behind, e_behind)
    loss = tl.sum(part, 1).to(tl.float64) * normaliser
    _store_row(values, bound, row, exists, look, defined, loss, w)

    if gradient is not None:
        gradient = starts_of(gradient, n, m, g_n, g_m)
        _, _, seen, e_seen = _prefixes(ratio, e)
        factor = (tl.where(defined, w, float("nan")) * normaliser).to(wide)
        slope = _slope(s, there, seen, e_seen, of_rest) * factor[:, None]
        slope = tl.where(look[:, None], slope, 0.0)
        pointers = gradient[:, None] + place * g_c
        tl.store(pointers, narrowed(slope, pointers), mask=exists[:, None] & (place < classes))


@triton.jit
def _source(place, label, place_of_label):
    """Where in the given order the class of a place stands, the label having gone to the front."""
    behind = (label[:, None] >= 0) & (place[None, :] <= place_of_label[:, None])
    return tl.where(behind, place[None, :] - 1, place[None, :])


@triton.jit
def _class_at(order, o_c, place, label, place_of_label, classes, look):
    source = _source(place, label, place_of_label)
    there = (place < classes)[None, :] & look[:, None]
    given = tl.load(order[:, None] + source.to(tl.int64) * o_c, mask=there & (source >= 0), other=0).to(
        tl.int64
    )
    found = tl.where(source < 0, label[:, None], given)
    return found, there & (found >= 0) & (found < classes)


@triton.jit
def _ranked(
    student, teacher, target, order, weight, values, bound, gradient, mantissas, scales,
    outer, classes, inner,
    s_n, s_c, s_m, t_n, t_c, t_m, o_n, o_c, o_m, g_n, g_c, g_m, places, softness_high, softness_low,
    height: tl.constexpr, width: tl.constexpr, wide: tl.constexpr,
):  # fmt: skip
    row, n, m, exists = rows_of(outer, inner, height)
    w = weights_of(weight, row, exists)
    look = w != 0.0
    student = starts_of(student, n, m, s_n, s_m)
    teacher = starts_of(teacher, n, m, t_n, t_m)
    order = starts_of(order, n, m, o_n, o_m)
    softness = number(softness_high, softness_low).to(wide)
    label = _label_of(target, row, look)
    named = look & (label >= 0) & (label < classes)

    top_s = tl.full([height], float("-inf"), wide)
    top_t = tl.full([height], float("-inf"), wide)
    spoilt = tl.zeros([height], tl.int32)
    place_of_label = tl.full([height], -1, tl.int64)
    total = tl.zeros([height], tl.int64)
    for start in range(0, classes, width):
        column = start + tl.arange(0, width)
        there = (column < classes)[None, :] & look[:, None]
        s = load_logits(student, s_c, column, classes, look, wide)
        t = load_logits(teacher, t_c, column, classes, look, wide)
        top_s, top_t = tl.maximum(top_s, tl.max(s, 1)), tl.maximum(top_t, tl.max(t, 1))
        given = tl.load(order[:, None] + (column.to(tl.int64) * o_c)[None, :], mask=there, other=0).to(
            tl.int64
        )
        wrong = (
            (s != s) | (t != t) | (s == float("inf")) | (t == float("inf")) | (given < 0) | (given >= classes)
        )
        spoilt = tl.maximum(spoilt, tl.max(wrong.to(tl.int32), 1))
        here = tl.where(there & (given == label[:, None]), column[None, :].to(tl.int64), -1)
        place_of_label = tl.maximum(place_of_label, tl.max(here, 1))
        total += tl.sum(tl.where(there, given - column[None, :], 0), 1)
    # Classes that stand in the order twice leave another sum, or a label that stands nowhere.
    spoilt = tl.where((total != 0) & look, 1, spoilt)
    spoilt = tl.where(named & (place_of_label < 0), 1, spoilt)
    label_s, label_t = load_label(student, s_c, label, named), load_label(teacher, t_c, label, named)
    defined = _described(top_s, top_t, spoilt, label, label_s, label_t, classes)
    top_t = tl.where(tl.abs(top_t) < float("inf"), top_t, 0.0)
    label = tl.where(named, label, -1)

    # From the last place to the first: Z, and the loss.
    if gradient is not None:
        mantissas, scales = mantissas + row * classes, scales + row * classes
    loss = tl.zeros([height], tl.float64)
    alphas = tl.zeros([height], tl.float64)
    carry = tl.zeros([height], wide)
    e_carry = _nothing(carry)
    tiles = tl.cdiv(classes, width)
    for back in range(0, tiles):
        column = (tiles - 1 - back) * width + tl.arange(0, width)
        found, there = _class_at(order, o_c, column, label, place_of_label, classes, look)
        s = _load_at(student, s_c, found, there, wide)
        t = _load_at(teacher, t_c, found, there, wide)
        alpha = exp((t - top_t[:, None]) * softness)
        alphas += tl.sum(alpha, 1).to(tl.float64)
        alpha = tl.where(column[None, :] < places, alpha, 0.0)
        z, e, behind, e_behind = _suffixes(s, there)
        z, e = _add(z, e, carry[:, None], e_carry[:, None])
        behind, e_behind = _add(behind, e_behind, carry[:, None], e_carry[:, None])
        part, _, _ = _choice(s, alpha, z, e, behind, e_behind)
        loss += tl.sum(part, 1).to(tl.float64)
        carry, e_carry = _at(z, 0), _at(e, 0)
        if gradient is not None:
            inside = exists[:, None] & (column < classes)[None, :]
            tl.store(mantissas[:, None] + column[None, :], z, mask=inside)
            tl.store(scales[:, None] + column[None, :], e, mask=inside)
    normaliser = 1.0 / alphas
    _store_row(values, bound, row, exists, look, defined, loss * normaliser, w)

    if gradient is not None:
        # What was stored is read again, by other threads.
        tl.debug_barrier()
        gradient = starts_of(gradient, n, m, g_n, g_m)
        factor = (tl.where(defined, w, float("nan")) * normaliser).to(wide)
        carry = tl.zeros([height], wide)
        e_carry = _nothing(carry)
        for start in range(0, classes, width):
            column = start + tl.arange(0, width)
            found, there = _class_at(order, o_c, column, label, place_of_label, classes, look)
            s = _load_at(student, s_c, found, there, wide)
            t = _load_at(teacher, t_c, found, there, wide)
            alpha = exp((t - top_t[:, None]) * softness)
            alpha = tl.where(column[None, :] < places, alpha, 0.0)
            inside = exists[:, None] & (column < classes)[None, :]
            follows = exists[:, None] & (column < classes - 1)[None, :]
            z = tl.load(mantissas[:, None] + column[None, :], mask=inside, other=0.0)
            e = tl.load(scales[:, None] + column[None, :], mask=inside, other=0.0)
            behind = tl.load(mantissas[:, None] + column[None, :] + 1, mask=follows, other=0.0)
            e_behind = tl.load(scales[:, None] + column[None, :] + 1, mask=follows, other=0.0)
            e_behind = tl.where(follows, e_behind, _nothing(e_behind))
            _, ratio, of_rest = _choice(s, alpha, z, e, behind, e_behind)
            sums, e_sums, seen, e_seen = _prefixes(ratio, e)
            seen, e_seen = _add(seen, e_seen, carry[:, None], e_carry[:, None])
            sums, e_sums = _add(sums, e_sums, carry[:, None], e_carry[:, None])
            carry, e_carry = _at(sums, width - 1), _at(e_sums, width - 1)
            slope = _slope(s, there, seen, e_seen, of_rest) * factor[:, None]
            slope = tl.where(look[:, None], slope, 0.0)
            # Every class once, also in rows that are not looked at or whose order is none.
            whole = (look & defined)[:, None]
            place = tl.where(whole, found, column[None, :].to(tl.int64))
            slope = tl.where(whole | (look == 0)[:, None], slope, float("nan"))
            pointers = gradient[:, None] + place * g_c
            tl.store(pointers, narrowed(slope, pointers), mask=inside & (place >= 0) & (place < classes))


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
            some = (student, teacher, target, weight, values, bound, asked)
            gpu_top_k.first_k(*some, top_k, teacher_temperature)
            return values, bound, gradient
    numbers = [min(top_k, classes), *split_number(1 / teacher_temperature)]
    if order is None and classes <= LONGEST and wide == tl.float32:
        launch(
            _sorted,
            student,
            *(student, teacher, target, weight, values, bound, asked),
            after=[*strides(student), *strides(teacher), *of_gradient, *numbers],
            whole_rows=True,
            per_warp=128,
            wide=wide,
        )
        return values, bound, gradient
    if order is None:
        order = teacher.sort(dim=1, descending=True, stable=True).indices
    sums = [values.new_empty(values.numel() * classes) if needs_gradient else None for _ in range(2)]
    launch(
        _ranked,
        student,
        *(student, teacher, target, order, weight, values, bound, asked, *sums),
        after=[*strides(student), *strides(teacher), *strides(order), *of_gradient, *numbers],
        most=1024,
        per_warp=128,
        wide=wide,
    )
    return values, bound, gradient
