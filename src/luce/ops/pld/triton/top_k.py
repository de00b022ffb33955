"""PLD with `top_k` for long rows, without a sort.

A program has one row. It reads the teacher once and the student twice:

1. The teacher: its normaliser, and the largest logit of every block of classes. The K-th largest of these
   maxima is a lower bound of the K-th largest logit: only classes in the few blocks that reach it can be
   among the first K. These blocks are read again, and their classes above the bound are gathered and ranked.
2. The student without these K: the other blocks as they are, then the few blocks without their first K. So
   the tail is a sum, never a difference that would cancel.
3. Suffix sums and loss of the K places, starting from the tail.
4. The student again for the gradient, from the end: the blocks read last may still be in the cache. The
   entries of the first K are overwritten.

If more classes reach the bound than there is room for, as in a sorted vocabulary, bisection over the bits of
the logits finds the K-th largest; it reads these blocks once for each bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...triton import launch
from ...triton.launch import split_number, strides
from ...triton.math import exp, finite_top, number
from ...triton.rows import load_label, narrowed, weights_of
from ...triton.scan import add, at, nothing, prefixes, suffixes
from .row import choice, described, label_of, store_row

MOST_PLACES = 512
MOST_BLOCKS = 4096
CAPACITY = 256
"""Candidates for which there is room: this many, or four times the places if that is more."""


@triton.jit
def _accumulate(top, total, x, softness, precise: tl.constexpr):
    """Add a tile to each block's running maximum and to sums of exponentials, one sum for each thread."""
    rate = (softness * 1.4426950408889634).to(tl.float32)
    new = tl.maximum(top, tl.max(x, 1))
    base = finite_top(new)
    total *= tl.exp2((top - base) * rate)[:, None]
    d = x - base[:, None]
    if precise:
        # Smaller terms become e^-87, which does not change a sum with a term of 1. Without the bound, the
        # correction below would be inf - inf for excluded classes. NaN stays.
        lowest = (-87.0 / softness).to(tl.float32)
        d = tl.maximum(d, lowest, propagate_nan=tl.PropagateNan.ALL)
        y = d * rate
        e = tl.exp2(y)
        low = (softness * 1.4426950408889634 - rate).to(tl.float32)
        rounded = tl.fma(d, rate + tl.zeros_like(d), -y) + d * low
        e = tl.fma(e, rounded * 0.6931471805599453, e)
    else:
        e = tl.exp2(d * rate)
    return new, total + e


@triton.jit
def _together(top, total, softness):
    """Join the blocks: the row's maximum and sum of exponentials relative to it; NaN after NaN or +inf."""
    most = tl.max(top, 0)
    shares = tl.exp((top - finite_top(most)).to(tl.float64) * softness)
    return most, tl.sum(tl.sum(total.to(tl.float64), 1) * shares, 0)


@triton.jit
def _load(start, stride, column, there):
    """Load logits in float32; -inf where there is no class."""
    return tl.load(start + column.to(tl.int64) * stride, mask=there, other=float("-inf")).to(tl.float32)


@triton.jit
def _turned(pattern, bits: tl.constexpr):
    """Map the upper bits of a float32 to an integer of the same order, and back."""
    return pattern ^ ((pattern >> 31) & (0x7FFFFFFF >> (32 - bits)))


@triton.jit
def _key(t, bits: tl.constexpr):
    return _turned(t.to(tl.int32, bitcast=True) >> (32 - bits), bits)


@triton.jit
def _logit(key, bits: tl.constexpr):
    """Return the logit of a key; NaN for the lowest key and the highest."""
    return (_turned(key, bits) << (32 - bits)).to(tl.float32, bitcast=True)


@triton.jit
def _lowest(bits: tl.constexpr):
    return tl.full([], -(2 ** (bits - 1)), tl.int64)


@triton.jit
def _listed_tile(listed, first, count, classes, height: tl.constexpr, width: tl.constexpr):
    """Return classes ``(height, width)`` of the listed blocks from `first` on, and whether they exist."""
    which = first + tl.arange(0, height)
    block = tl.load(listed + which, mask=which < count, other=0)
    column = block[:, None] * width + tl.arange(0, width)[None, :]
    return column, (which < count)[:, None] & (column < classes)


@triton.jit
def _kth_listed(
    teacher, t_c, listed, count, classes, label, wanted,
    height: tl.constexpr, width: tl.constexpr, bits: tl.constexpr,
):  # fmt: skip
    """Return the `wanted`-th largest logit, above -inf, of the classes in the listed blocks but the label."""
    least = _lowest(bits)
    step = -least
    for _ in range(bits):
        trial = _logit((least + step).to(tl.int32), bits)
        found = tl.zeros([height], tl.int32)
        for first in range(0, count, height):
            column, there = _listed_tile(listed, first, count, classes, height, width)
            t = _load(teacher, t_c, column, there)
            found += tl.sum((there & (column != label) & (t >= trial)).to(tl.int32), 1)
        least = tl.where(tl.sum(found, 0) >= wanted, least + step, least)
        step = step >> 1
    return _logit(least.to(tl.int32), bits)


@triton.jit
def _collect(
    teacher, t_c, listed, count, classes, label, least, wanted, rivals, capacity,
    height: tl.constexpr, width: tl.constexpr,
):  # fmt: skip
    """Gather the classes above a logit and the first `wanted` at it, by index; return their number."""
    above = tl.full([], 0, tl.int32)
    equal = tl.full([], 0, tl.int32)
    for first in range(0, count, height):
        column, there = _listed_tile(listed, first, count, classes, height, width)
        t = _load(teacher, t_c, column, there)
        there = there & (column != label)
        # Two counts in one number: no tile has 65536 classes.
        each = tl.where(there & (t > least), 1, tl.where(there & (t == least), 65536, 0))
        of_block = tl.sum(each, 1)
        before = tl.cumsum(each, 1) - each + (tl.cumsum(of_block, 0) - of_block)[:, None]
        same = equal + (before >> 16)
        spot = above + (before & 0xFFFF) + tl.minimum(same, wanted)
        keep = (each == 1) | ((each > 1) & (same < wanted))
        keep = keep & (spot < capacity)
        tl.store(rivals + spot, column, mask=keep)
        of_tile = tl.sum(of_block, 0)
        above += of_tile & 0xFFFF
        equal += of_tile >> 16
    return above + tl.minimum(equal, wanted)


@triton.jit
def _rank(rivals, logits, count, wanted, ranked, ranked_logits, group: tl.constexpr, steps: tl.constexpr):
    """Rank each gathered class by the number of those before it, and store the `wanted` first in order."""
    for first in range(0, count, group):
        i = first + tl.arange(0, group)
        t = tl.load(logits + i, mask=i < count, other=float("-inf"))
        rank = tl.zeros([group], tl.int32)
        for other in range(0, count, steps):
            j = other + tl.arange(0, steps)
            rival = tl.load(logits + j, mask=j < count, other=float("-inf"))[:, None]
            before = (rival > t[None, :]) | ((rival == t[None, :]) & (j[:, None] < i[None, :]))
            rank += tl.sum(before.to(tl.int32), 0)
        keep = (i < count) & (rank < wanted)
        tl.store(ranked + rank, tl.load(rivals + i, mask=i < count, other=0), mask=keep)
        tl.store(ranked_logits + rank, t, mask=keep)


@triton.jit
def _first_k(
    student, teacher, target, weight, values, bound, gradient, indices, logits,
    classes, s_n, s_c, t_n, t_c, g_n, g_c, places, softness_high, softness_low,
    height: tl.constexpr, width: tl.constexpr, blocks: tl.constexpr, capacity: tl.constexpr,
    head: tl.constexpr, bits: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    w = weights_of(weight, row, row >= 0)
    look = tl.where(w != 0.0, 1, 0) > 0
    student += row * s_n
    teacher += row * t_n
    softness = number(softness_high, softness_low)
    label = label_of(target, row, look)
    named = look & (label >= 0) & (label < classes)
    label_s, label_t = load_label(student, s_c, label, named), load_label(teacher, t_c, label, named)
    only = tl.where(named, label, -1).to(tl.int32)  # the label, or no class
    labels = named.to(tl.int32)
    others = places - labels
    end = tl.where(look, classes, 0)

    listed = indices + row * (blocks + capacity + head)
    rivals = listed + blocks
    ranked = rivals + capacity
    peaks = logits + row * (blocks + capacity + head)
    rival_logits = peaks + blocks
    ranked_logits = rival_logits + capacity

    # The teacher's normaliser, and the blocks with its largest logits.
    spot = tl.arange(0, height)[:, None] * width + tl.arange(0, width)[None, :]
    top = tl.full([height], float("-inf"), tl.float32)
    total = tl.zeros([height, width], tl.float32)
    for start in range(0, end, height * width):
        t = _load(teacher, t_c, start + spot, start + spot < classes)
        of_tile = start // width + tl.arange(0, height)
        tl.store(peaks + of_tile, tl.max(t, 1), mask=of_tile < blocks)
        top, total = _accumulate(top, total, t, softness, teacher.dtype.element_ty == tl.float32)
    top_t, alphas = _together(top, total, softness)

    tl.debug_barrier()  # here and below: other threads read what this one has stored
    block = tl.arange(0, blocks)
    known = block * width < end
    peak = tl.load(peaks + block, mask=known, other=0.0)
    key = tl.where(known, _key(peak, bits), _lowest(bits).to(tl.int32))
    least_key = _lowest(bits)
    step = -least_key
    for _ in range(bits):
        enough = tl.sum((key >= (least_key + step).to(tl.int32)).to(tl.int32), 0) >= places
        least_key = tl.where(enough, least_key + step, least_key)
        step = step >> 1
    least_peak = _logit(least_key.to(tl.int32), bits)
    # The label's block is among them: the label belongs to the first places.
    chosen = known & ((peak >= least_peak) | ((block == only // width) & (only >= 0)))
    count = tl.sum(chosen.to(tl.int32), 0)
    tl.store(listed + tl.cumsum(chosen.to(tl.int32), 0) - 1, block, mask=chosen)
    tl.debug_barrier()

    # The largest of these classes.
    few: tl.constexpr = height // 4 if height > 4 else 1  # fewer registers than four times as many
    group: tl.constexpr = capacity if capacity < 256 else 256
    found = _collect(
        teacher, t_c, listed, count, classes, only, least_peak, others, rivals, capacity,
        few, width,
    )  # fmt: skip
    if found > capacity:  # the largest classes crowd in few blocks
        exact = _kth_listed(teacher, t_c, listed, count, classes, only, others, few, width, bits)
        tl.debug_barrier()
        found = _collect(
            teacher, t_c, listed, count, classes, only, exact, others, rivals, capacity,
            few, width,
        )  # fmt: skip
    tl.debug_barrier()
    for first in range(0, found, group):
        i = first + tl.arange(0, group)
        rival = tl.load(rivals + i, mask=i < found, other=0)
        tl.store(rival_logits + i, _load(teacher, t_c, rival, i < found), mask=i < found)
    tl.debug_barrier()
    _rank(rivals, rival_logits, found, others, ranked, ranked_logits, group, group // 8)
    tl.debug_barrier()
    taken = tl.minimum(found, others)
    last = tl.load(ranked + taken - 1, mask=taken > 0, other=-1)
    least = tl.load(ranked_logits + taken - 1, mask=taken > 0, other=float("inf"))

    # The student without them.
    one = tl.full([], 1.0, tl.float64)
    precise: tl.constexpr = student.dtype.element_ty == tl.float32
    top = tl.full([height], float("-inf"), tl.float32)
    total = tl.zeros([height, width], tl.float32)
    for start in range(0, end, height * width):
        of_tile = start // width + tl.arange(0, height)
        there = of_tile * width < end
        high = tl.load(peaks + of_tile, mask=there, other=0.0) >= least_peak
        there = there & (high == 0) & ((of_tile != only // width) | (only < 0))
        s = _load(student, s_c, start + spot, there[:, None] & (start + spot < classes))
        top, total = _accumulate(top, total, s, one, precise)
    for first in range(0, count, height):
        column, inside = _listed_tile(listed, first, count, classes, height, width)
        t = _load(teacher, t_c, column, inside)
        of_head = (t > least) | ((t == least) & (column <= last)) | (column == only)
        s = _load(student, s_c, column, inside & (of_head == 0))
        top, total = _accumulate(top, total, s, one, precise)
    top_rest, rest = _together(top, total, one)

    # The places, the label first.
    place = tl.arange(0, head)[None, :] - labels
    inside = (place < taken) & (place >= 0)
    member = tl.load(ranked + place, mask=inside, other=0)
    member = tl.where(place < 0, only, member)
    inside = inside | (place < 0)
    s = _load(student, s_c, member, inside)
    t = _load(teacher, t_c, member, inside)
    # Reductions to scalars, not to tensors of one element, which would tie the layouts of the tiles together.
    top_s = tl.maximum(top_rest, tl.max(tl.max(s, 1), 0))
    spoilt = tl.max(tl.max((s != s).to(tl.int32), 1), 0)
    spoilt = tl.where((alphas != alphas) | (rest != rest), 1, spoilt)
    defined = described(top_s, top_t, spoilt, label, label_s, label_t, classes)
    top_t = tl.where(tl.abs(top_t) < float("inf"), top_t, 0.0)
    alpha = tl.where(inside, exp((t - top_t) * softness.to(tl.float32)), 0.0)
    e_rest = tl.where(top_rest == float("-inf"), nothing(top_rest), top_rest)
    z, e, behind, e_behind = suffixes(s, inside)
    z, e = add(z, e, rest.to(tl.float32), e_rest)
    behind, e_behind = add(behind, e_behind, rest.to(tl.float32), e_rest)
    part, ratio, of_rest = choice(s, alpha, exp(s - e), behind * exp(e_behind - e), e)
    loss = tl.sum(tl.sum(part, 1), 0).to(tl.float64) / alphas
    store_row(values, bound, row, row >= 0, look, defined, loss, w)

    if gradient is not None:
        gradient += row * g_n
        factor = (tl.where(defined, w, float("nan")) / alphas).to(tl.float32)
        sums, e_sums, seen, e_seen = prefixes(ratio, e)
        shared = tl.where(look, tl.sum(at(sums, head - 1), 0) * factor, 0.0)
        e_shared = tl.sum(at(e_sums, head - 1), 0)
        size: tl.constexpr = height * width
        tiles = tl.cdiv(classes, size)
        for back in range(0, tiles):
            column = (tiles - 1 - back) * size + spot
            pointers = gradient + column.to(tl.int64) * g_c
            x = _load(student, s_c, column, (column < classes) & look) + e_shared
            power = exp(x) if precise else tl.exp2(x * 1.4426950408889634)
            tl.store(pointers, narrowed(power * shared, pointers), mask=column < classes)
        tl.debug_barrier()
        seen = tl.where((s > float("-inf")) & (seen > 0.0), seen * exp(s + e_seen), 0.0)
        slope = (seen - of_rest) * factor
        pointers = gradient + member.to(tl.int64) * g_c
        tl.store(pointers, narrowed(slope, pointers), mask=inside & look)


def fits(student: Tensor, places: int) -> bool:
    """Return whether rows are long enough for so few places; ``(N, C, M)`` is left to the sort."""
    classes = student.shape[1]
    few = 0 < places <= min(MOST_PLACES, classes // 16)
    return student.ndim == 2 and few and _block(classes, places) <= launch.TILE // 4


def _block(classes: int, places: int) -> int:
    """Return the classes of a block, so few that there are at least twice as many blocks as places."""
    block = min(64, 2 ** ((classes // (2 * places)).bit_length() - 1))
    return max(block, triton.next_power_of_2(triton.cdiv(classes, MOST_BLOCKS)))


def first_k(
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None,
    weight: Tensor | None,
    values: Tensor,
    bound: Tensor,
    gradient: Tensor | None,
    places: int,
    teacher_temperature: float,
) -> None:
    """Fill values, bound and gradient of rows ``(N, C)`` that `fits`, float32 or narrower."""
    rows, classes = student.shape
    if not rows:
        return
    # Rows at any address are read a class at a time; a full tile would then spill registers.
    aligned = classes % 16 == 0 and all(
        x.stride(1) == 1 and x.stride(0) % 16 == 0 for x in (student, teacher)
    )
    width = _block(classes, places)
    blocks = triton.next_power_of_2(triton.cdiv(classes, width))
    capacity = triton.next_power_of_2(max(CAPACITY, 4 * places))
    head = triton.next_power_of_2(places)
    indices = torch.empty(rows * (blocks + capacity + head), dtype=torch.int32, device=student.device)
    with launch.on_device(student):
        _first_k[(rows,)](
            *(student, teacher, target, weight, values, bound, gradient),
            *(indices, torch.empty_like(indices, dtype=torch.float32), classes),
            *strides(student)[:2],
            *strides(teacher)[:2],
            *(strides(gradient)[:2] if gradient is not None else (0, 0)),
            *(places, *split_number(1 / teacher_temperature)),
            height=(launch.TILE if aligned else launch.TILE // 4) // width,
            width=width,
            blocks=blocks,
            capacity=capacity,
            head=head,
            # The bits of a float32 that the teacher's dtype can set: bisection needs no more steps.
            bits={torch.bfloat16: 16, torch.float16: 19}.get(teacher.dtype, 32),
            num_warps=4,
            maxnreg=128,
        )
