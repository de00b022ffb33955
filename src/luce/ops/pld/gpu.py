"""PLD in Triton; csrc/kernels/pld.cpp has the notation.

Rows that fit into the registers of a program are sorted there, and all else is done in the same visit.
Longer rows, rows of float64, and rows whose order is known go through a second kernel: it takes the order
from memory, where a sort of PyTorch's may have left it, and walks over the places a tile at a time.

A sum of exponentials is a mantissa times e^scale. The scale is the largest logit from a place on: a suffix
keeps its digits, however far it lies below the row's top.

Tiles are ``(each, height, lanes)``: a thread (a lane) holds `each` neighbouring places of a row. Triton lays
out a single dimension over threads first and then over registers, as long as it does not load vectors; so a
tile is loaded and stored as one. Of three dimensions, versions before 3.7 may choose another order. Scans and
most steps of the sort then stay within a thread. Any other layout is right, but slower.
"""

from __future__ import annotations

from collections.abc import Iterator

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
    log1p_rest,
    narrowed,
    number,
    rows_of,
    split,
    split_number,
    starts_of,
    strides,
    tile,
    times_ln2,
    weights_of,
    wide_type,
)
from .._triton_scan import at, nothing

LONGEST = 4096
"""The most classes of a row that is sorted in registers: eight warps, and half a minute to compile."""

EACH = 16
"""Places that a thread holds when it sorts. More spill registers, fewer are more work between threads."""

LARGEST = 2**25
"""Logits whose order is in memory at a time: it, PyTorch's sort and what a gradient needs take about 40 bytes
of each. This leaves more than 128 rows of 200,000 classes; fewer PyTorch would sort in a slower way."""


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def _join(z_before, e_before, z, e):
    """The sum of what a scan has seen so far and of what comes, on the scale of the latter.

    It may be the smaller scale of the two, for a prefix alpha/Z has the scale -e. Terms only ever shrink.
    """
    return z + z_before * exp(-tl.abs(e_before - e)), e


@triton.jit
def _held(x, place: tl.constexpr):
    """``(height, lanes)``: what each thread holds in one of its places."""
    bits = x.to(tl.int64 if x.dtype == tl.float64 else tl.int32, bitcast=True)
    here = (tl.arange(0, x.shape[0]) == place)[:, None, None]
    return tl.sum(tl.where(here, bits, 0), 0).to(x.dtype, bitcast=True)


@triton.jit
def _next_lane(x, step: tl.constexpr, end):
    """What the lane `step` further on holds, and `end` where there is none."""
    lane = tl.arange(0, x.shape[1])[None, :] + tl.zeros(x.shape, tl.int32)
    there = (lane + step >= 0) & (lane + step < x.shape[1])
    return tl.where(there, tl.gather(x, tl.where(there, lane + step, lane), 1), end[:, None])


@triton.jit
def _scan(own, e, carry, e_carry, reverse: tl.constexpr):
    """Sums of `own` over all places before each one (behind it, if `reverse`), on the scales of the places.

    Scales fall from place to place. What the places of a thread add up to is the same few instructions for
    each; only the threads' sums are scanned across threads.

    Args:
        own: ``(each, height, lanes)``, of places that have the scales `e`.
        carry: ``(height,)``, the sum of what came before the tile, on the scale `e_carry`.
    Returns:
        Sums like `own`, and the carry and its scale after this tile.
    """
    each: tl.constexpr = own.shape[0]
    lanes: tl.constexpr = own.shape[2]
    step: tl.constexpr = 1 if reverse else -1
    index = tl.arange(0, each)[:, None, None]
    others = tl.zeros_like(own)
    z = tl.zeros([own.shape[1], lanes], own.dtype)
    scale = _held(e, each - 1 if reverse else 0)
    for place in tl.static_range(each - 1 if reverse else 0, -1 if reverse else each, -step):
        z, scale = z * exp(-tl.abs(scale - _held(e, place))), _held(e, place)
        others = tl.where(index == place, z[None], others)
        z += _held(own, place)
    at_start = (tl.arange(0, lanes) == (lanes - 1 if reverse else 0))[None, :]
    z += tl.where(at_start, carry[:, None] * exp(-tl.abs(e_carry[:, None] - scale)), 0.0)
    z, scale = tl.associative_scan((z, scale), 1, _join, reverse=reverse)
    before, e_before = _next_lane(z, step, carry), _next_lane(scale, step, e_carry)
    others += before[None] * exp(-tl.abs(e_before[None] - e))
    last: tl.constexpr = 0 if reverse else lanes - 1
    return others, at(z, last), at(scale, last)


@triton.jit
def _scales(s, e_carry):
    """The largest logit from each place on; `e_carry` is the largest behind the tile."""
    each: tl.constexpr = s.shape[0]
    s = tl.maximum(s, nothing(s))
    top = tl.associative_scan(tl.max(s, 0), 1, _larger, reverse=True)
    top = tl.maximum(_next_lane(top, 1, e_carry), e_carry[:, None])
    for i in tl.static_range(each):
        top = tl.maximum(top, _held(s, each - 1 - i))
        s = tl.where((tl.arange(0, each) == each - 1 - i)[:, None, None], top[None], s)
    return s


@triton.jit
def _choice(s, alpha, own, behind, e):
    """One place: its class weighs `own` and those behind it `behind`, on the scale e.

    Returns:
        The place's part in the loss, alpha/Z (on the scale -e), and alpha times the others' share.
    """
    z = own + behind
    empty = z == 0.0
    z = tl.where(empty, 1.0, z)
    over = 1.0 / z
    p = own * over
    rest = tl.where(empty, 1.0, behind * over)
    x = s - e
    near = x > -60.0
    n, f = split(tl.where(near, p, z))
    f = tl.where(near & (n == 0.0), -rest, f)  # 1 - p is known better than p tells it
    nll = times_ln2(n, f + log1p_rest(f))
    nll = tl.where(near, -nll, nll - x)
    nll = tl.where(s == float("-inf"), float("inf"), nll)
    counts = alpha > 0.0
    part = tl.where(counts, alpha * tl.where(counts, nll, 0.0), 0.0)
    return part, tl.where(empty, 0.0, alpha * over), alpha * rest


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
def _in_line(x, like):
    """A tile as one dimension, lanes side by side."""
    return tl.reshape(tl.broadcast_to(x, like.shape), (like.numel,))


@triton.jit
def _pointers(starts, class_stride, place, there):
    pointers = _in_line(starts[None, :, None] + place.to(tl.int64) * class_stride, there)
    # No vectors: for them, places would move to other threads than the scans want them in.
    return tl.max_contiguous(pointers, [1])


@triton.jit
def _load_at(starts, class_stride, place, there):
    pointers = _pointers(starts, class_stride, place, there)
    return tl.reshape(tl.load(pointers, mask=_in_line(there, there), other=0.0), there.shape)


@triton.jit
def _store_at(starts, class_stride, place, x, there):
    pointers = _pointers(starts, class_stride, place, there)
    tl.store(pointers, narrowed(_in_line(x, there), pointers), mask=_in_line(there, there))


@triton.jit
def _widened(x, there, wide: tl.constexpr):
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
def _columns(each: tl.constexpr, width: tl.constexpr):
    """Columns of a tile, neighbours in neighbouring lanes."""
    lanes: tl.constexpr = width // each
    return tl.arange(0, each)[:, None, None] * lanes + tl.arange(0, lanes)[None, None, :]


@triton.jit
def _places(each: tl.constexpr, width: tl.constexpr):
    """Places of a tile, neighbours in the same thread."""
    return tl.arange(0, each)[:, None, None] + each * tl.arange(0, width // each)[None, None, :]


@triton.jit
def _of_row(x, larger: tl.constexpr):
    return tl.max(tl.max(x, 0), 1) if larger else tl.sum(tl.sum(x, 0), 1)


@triton.jit
def _rising(bits):
    """To order the bits of floating-point numbers as integers; its own inverse."""
    width: tl.constexpr = bits.dtype.primitive_bitwidth
    return bits ^ ((bits >> (width - 1)) & (0x7FFF if width == 16 else 0x7FFFFFFF))


@triton.jit
def _key(t, column, classes, first):
    """Numbers that rise where the teacher's logits fall, the label's lowest; the lower half is the class."""
    half: tl.constexpr = t.dtype.primitive_bitwidth
    bits = t.to(tl.int16 if half == 16 else tl.int32, bitcast=True)
    zero = (bits << 1) == 0  # zeros of both signs are equal
    key = ~_rising(tl.where(zero, 0, bits))
    key = tl.where(first, -32768 if half == 16 else -2147483648, key)
    key = tl.where(column < classes, key, 32767 if half == 16 else 2147483647)
    whole: tl.constexpr = tl.int32 if half == 16 else tl.int64
    return (key.to(whole) << half) | column.to(whole)


@triton.jit
def _logit_and_class(key, kind: tl.constexpr):
    half: tl.constexpr = kind.primitive_bitwidth
    number: tl.constexpr = tl.int16 if half == 16 else tl.int32
    t = _rising(~((key >> half).to(number))).to(kind, bitcast=True)
    return t, (key & (0xFFFF if half == 16 else 0x7FFFFFFF)).to(tl.int32)


@triton.jit
def _exchange(key, distance: tl.constexpr, run: tl.constexpr, width: tl.constexpr, each: tl.constexpr):
    """Order the keys `distance` apart, runs of `run` rising and falling in turn, rows of `width` rising."""
    pairs: tl.constexpr = key.shape[0] // (2 * distance)
    x = tl.reshape(key, (pairs, 2, distance))
    other = tl.sum(x, 1, keep_dims=True) - x  # integers wrap around, there and back
    second = tl.arange(0, 2)[None, :, None] == 1
    swap = (x > other) != second
    if distance < each:
        swap = tl.where(second, other > x, x > other)  # both in one thread: one comparison for the two
    if run < width:
        swap = swap != (tl.arange(0, pairs)[:, None, None] * (2 * distance) // run % 2 == 1)
    return tl.reshape(tl.where(swap, other, x), key.shape)


@triton.jit
def _in_order(key, height: tl.constexpr, width: tl.constexpr):
    """Every row's keys from the lowest to the highest, neighbours in one thread: a bitonic sort.

    `tl.sort` takes a third more instructions, since it compares each pair twice.
    """
    each: tl.constexpr = key.shape[0]
    key = tl.reshape(tl.permute(key, (1, 2, 0)), (height * width,))
    for i in tl.static_range(1, 32):
        if 2**i <= width:
            for j in tl.static_range(i):
                key = _exchange(key, 2 ** (i - 1 - j), 2**i, width, each)
    return tl.permute(tl.reshape(key, (height, width // each, each)), (2, 0, 1))


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
    label = _label_of(target, row, look)
    named = look & (label >= 0) & (label < classes)

    column = _columns(each, width)
    there = (column < classes) & look[None, :, None]
    s = _widened(_load_at(student, s_c, column, there), column < classes, wide)
    t_own = _load_at(teacher, t_c, column, there)
    t = _widened(t_own, column < classes, wide)
    top_s, top_t = _of_row(s, True), _of_row(t, True)
    spoilt = _of_row(((s != s) | (t != t)).to(tl.int32), True)
    label_s, label_t = load_label(student, s_c, label, named), load_label(teacher, t_c, label, named)
    defined = _described(top_s, top_t, spoilt, label, label_s, label_t, classes)
    top_t = tl.where(tl.abs(top_t) < float("inf"), top_t, 0.0)

    key = _in_order(_key(t_own, column, classes, column == label[None, :, None]), height, width)
    t, place = _logit_and_class(key, t_own.dtype)
    there = (place < classes) & look[None, :, None]
    t = _widened(t, there, wide)
    t = tl.where(place == label[None, :, None], label_t.to(wide)[None, :, None], t)
    s = _widened(_load_at(student, s_c, place, there), there, wide)

    alpha = exp((t - top_t[None, :, None]) * softness)
    normaliser = 1.0 / _of_row(alpha, False).to(tl.float64)
    alpha = tl.where(_places(each, width) < places, alpha, 0.0)
    zero = tl.zeros([height], wide)
    e = _scales(s, nothing(zero))
    own = exp(s - e)
    behind, _, _ = _scan(own, e, zero, nothing(zero), True)
    part, ratio, of_rest = _choice(s, alpha, own, behind, e)
    loss = _of_row(part, False).to(tl.float64) * normaliser
    _store_row(values, bound, row, exists, look, defined, loss, w)

    if gradient is not None:
        gradient = starts_of(gradient, n, m, g_n, g_m)
        before, _, _ = _scan(ratio, e, zero, nothing(zero), False)
        factor = (tl.where(defined, w, float("nan")) * normaliser).to(wide)
        slope = (own * before - of_rest) * factor[None, :, None]
        slope = tl.where(look[None, :, None], slope, 0.0)
        _store_at(gradient, g_c, place, slope, exists[None, :, None] & (place < classes))


@triton.jit
def _class_at(order, o_c, place, label, place_of_label, classes, look):
    """The class in a place, the label having gone to the front of the given order."""
    label, place_of_label = label[None, :, None], place_of_label[None, :, None]
    source = tl.where((label >= 0) & (place <= place_of_label), place - 1, place)
    there = (place < classes) & look[None, :, None]
    found = _load_at(order, o_c, source, there & (source >= 0)).to(tl.int64)
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
    label = _label_of(target, row, look)
    named = look & (label >= 0) & (label < classes)

    top_s = tl.full([height], float("-inf"), wide)
    top_t = tl.full([height], float("-inf"), wide)
    spoilt = tl.zeros([height], tl.int32)
    place_of_label = tl.full([height], -1, tl.int64)
    total = tl.zeros([height], tl.int64)
    for start in range(0, classes, width):
        column = start + _columns(each, width)
        there = (column < classes) & look[None, :, None]
        s = _widened(_load_at(student, s_c, column, there), there, wide)
        t = _widened(_load_at(teacher, t_c, column, there), there, wide)
        top_s = tl.maximum(top_s, _of_row(s, True))
        top_t = tl.maximum(top_t, _of_row(t, True))
        given = _load_at(order, o_c, column, there).to(tl.int64)
        wrong = (s != s) | (t != t) | (s == float("inf")) | (t == float("inf"))
        wrong = wrong | (given < 0) | (given >= classes)
        spoilt = tl.maximum(spoilt, _of_row(wrong.to(tl.int32), True))
        column = column.to(tl.int64)
        here = tl.where(there & (given == label[None, :, None]), column, -1)
        place_of_label = tl.maximum(place_of_label, _of_row(here, True))
        total += _of_row(tl.where(there, given * given * given - column * column * column, 0), False)
    # Classes that stand in the order twice leave another sum of cubes, or a label that stands nowhere.
    spoilt = tl.where((total != 0) & look, 1, spoilt)
    spoilt = tl.where(named & (place_of_label < 0), 1, spoilt)
    label_s, label_t = load_label(student, s_c, label, named), load_label(teacher, t_c, label, named)
    defined = _described(top_s, top_t, spoilt, label, label_s, label_t, classes)
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
        place = (tiles - 1 - back) * width + _places(each, width)
        found, there = _class_at(order, o_c, place, label, place_of_label, classes, look)
        s = _widened(_load_at(student, s_c, found, there), there, wide)
        t = _widened(_load_at(teacher, t_c, found, there), there, wide)
        alpha = exp((t - top_t[None, :, None]) * softness)
        alphas += _of_row(alpha, False).to(tl.float64)
        alpha = tl.where(place < places, alpha, 0.0)
        e = _scales(s, e_carry)
        own = exp(s - e)
        behind, carry, e_carry = _scan(own, e, carry, e_carry, True)
        part, _, _ = _choice(s, alpha, own, behind, e)
        loss += _of_row(part, False).to(tl.float64)
        if gradient is not None:
            # Side by side in memory is what the lanes hold, not the places.
            column = (tiles - 1 - back) * width + _columns(each, width)
            inside = exists[None, :, None] & (column >= 0)
            _store_at(sums, 1, column, behind, inside)
            _store_at(scales, 1, column, e, inside)
    normaliser = 1.0 / alphas
    _store_row(values, bound, row, exists, look, defined, loss * normaliser, w)

    if gradient is not None:
        # What was stored is read again, perhaps by other threads.
        tl.debug_barrier()
        gradient = starts_of(gradient, n, m, g_n, g_m)
        factor = (tl.where(defined, w, float("nan")) * normaliser).to(wide)[None, :, None]
        carry = tl.zeros([height], wide)
        e_carry = nothing(carry)
        for start in range(0, classes, width):
            place = start + _places(each, width)
            found, there = _class_at(order, o_c, place, label, place_of_label, classes, look)
            s = _widened(_load_at(student, s_c, found, there), there, wide)
            t = _widened(_load_at(teacher, t_c, found, there), there, wide)
            alpha = exp((t - top_t[None, :, None]) * softness)
            alpha = tl.where(place < places, alpha, 0.0)
            column = start + _columns(each, width)
            inside = exists[None, :, None] & (column >= 0)
            behind, e = _load_at(sums, 1, column, inside), _load_at(scales, 1, column, inside)
            own = exp(s - e)
            _, ratio, of_rest = _choice(s, alpha, own, behind, e)
            before, carry, e_carry = _scan(ratio, e, carry, e_carry, False)
            slope = (own * before - of_rest) * factor
            # Every class once, also in rows that are not looked at or whose order is none.
            whole = (look & defined)[None, :, None]
            slope = tl.where(whole, slope, tl.where(look[None, :, None], float("nan"), 0.0))
            column = tl.where(whole, found, place.to(tl.int64))
            inside = exists[None, :, None] & (place < classes) & (column >= 0) & (column < classes)
            _store_at(gradient, g_c, column, slope, inside)


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
