"""Tiles of places: how threads hold them, their sums, and their sort.

A tile is ``(each, height, lanes)``: a thread (a lane) holds `each` neighbouring places of a row, so that
scans and most steps of the sort stay within a thread. Triton lays out a single dimension over threads first
and then over registers, as long as it does not load vectors; so a tile is loaded and stored as one dimension.
Of three dimensions, versions before 3.7 may choose another order. Any other layout is correct, but slower.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...triton.math import exp
from ...triton.rows import narrowed
from ...triton.scan import at, nothing


@triton.jit
def columns_of(each: tl.constexpr, width: tl.constexpr):
    """Return the columns of a tile, neighbours in neighbouring lanes, so that loads coalesce."""
    lanes: tl.constexpr = width // each
    return tl.arange(0, each)[:, None, None] * lanes + tl.arange(0, lanes)[None, None, :]


@triton.jit
def places_of(each: tl.constexpr, width: tl.constexpr):
    """Return the places of a tile, neighbours in the same thread."""
    return tl.arange(0, each)[:, None, None] + each * tl.arange(0, width // each)[None, None, :]


@triton.jit
def _in_line(x, like):
    """Reshape a tile to one dimension, lanes side by side."""
    return tl.reshape(tl.broadcast_to(x, like.shape), (like.numel,))


@triton.jit
def _pointers(starts, class_stride, place, there):
    pointers = _in_line(starts[None, :, None] + place.to(tl.int64) * class_stride, there)
    # No vectors: they would move places to other threads than the scans need them in.
    return tl.max_contiguous(pointers, [1])


@triton.jit
def load_at(starts, class_stride, place, there):
    """Load a tile; 0 where there is no class."""
    pointers = _pointers(starts, class_stride, place, there)
    return tl.reshape(tl.load(pointers, mask=_in_line(there, there), other=0.0), there.shape)


@triton.jit
def store_at(starts, class_stride, place, x, there):
    """Store a tile where there is a class."""
    pointers = _pointers(starts, class_stride, place, there)
    tl.store(pointers, narrowed(_in_line(x, there), pointers), mask=_in_line(there, there))


@triton.jit
def widened(x, there, wide: tl.constexpr):
    """Convert loaded logits to the dtype of the calculation; -inf where there is no class."""
    if x.dtype.primitive_bitwidth == 16:
        x = x.to(tl.float32)
    return tl.where(there, x.to(wide), float("-inf"))


@triton.jit
def of_row(x, larger: tl.constexpr):
    """Return each row's maximum (`larger`) or sum."""
    return tl.max(tl.max(x, 0), 1) if larger else tl.sum(tl.sum(x, 0), 1)


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def _join(z_before, e_before, z, e):
    """Add a scan's sum so far to the next one, on the scale of the latter.

    That scale may be the smaller of the two, since a prefix of alpha/Z has the scale -e. Either way scales
    move in one direction along a scan, so that terms only shrink and nothing overflows.
    """
    return z + z_before * exp(-tl.abs(e_before - e)), e


@triton.jit
def _held(x, place: tl.constexpr):
    """Return ``(height, lanes)``, one place of each thread, by a sum of bits, which compiles to a copy."""
    bits = x.to(tl.int64 if x.dtype == tl.float64 else tl.int32, bitcast=True)
    here = (tl.arange(0, x.shape[0]) == place)[:, None, None]
    return tl.sum(tl.where(here, bits, 0), 0).to(x.dtype, bitcast=True)


@triton.jit
def _next_lane(x, step: tl.constexpr, end):
    """Return the number in the lane `step` further on, and `end` past the last lane."""
    lane = tl.arange(0, x.shape[1])[None, :] + tl.zeros(x.shape, tl.int32)
    there = (lane + step >= 0) & (lane + step < x.shape[1])
    return tl.where(there, tl.gather(x, tl.where(there, lane + step, lane), 1), end[:, None])


@triton.jit
def sums_before(own, e, carry, e_carry, reverse: tl.constexpr):
    """Sum `own` over all places before each one (behind it, if `reverse`), on the scales of the places.

    Scales fall from place to place. Each thread adds up its own places; only the threads' sums are scanned
    across threads.

    Args:
        own: ``(each, height, lanes)``, of places that have the scales `e`.
        carry: ``(height,)``, the sum over all places before the tile, on the scale `e_carry`.
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
def scales_of(s, e_carry):
    """Return the largest logit from each place on; `e_carry` is the largest behind the tile."""
    each: tl.constexpr = s.shape[0]
    s = tl.maximum(s, nothing(s))
    top = tl.associative_scan(tl.max(s, 0), 1, _larger, reverse=True)
    top = tl.maximum(_next_lane(top, 1, e_carry), e_carry[:, None])
    for i in tl.static_range(each):
        top = tl.maximum(top, _held(s, each - 1 - i))
        s = tl.where((tl.arange(0, each) == each - 1 - i)[:, None, None], top[None], s)
    return s


@triton.jit
def _rising(bits):
    """Map the bits of floating-point numbers to integers of the same order; its own inverse."""
    width: tl.constexpr = bits.dtype.primitive_bitwidth
    return bits ^ ((bits >> (width - 1)) & (0x7FFF if width == 16 else 0x7FFFFFFF))


@triton.jit
def key_of(t, column, classes, first):
    """Return integers that rise as the teacher's logits fall, the label's the lowest.

    The lower half is the class: equal logits are ranked by class index, as a stable sort ranks them.
    """
    half: tl.constexpr = t.dtype.primitive_bitwidth
    bits = t.to(tl.int16 if half == 16 else tl.int32, bitcast=True)
    zero = (bits << 1) == 0  # -0 equals 0, so that the class index decides between them
    key = ~_rising(tl.where(zero, 0, bits))
    key = tl.where(first, -32768 if half == 16 else -2147483648, key)
    key = tl.where(column < classes, key, 32767 if half == 16 else 2147483647)
    whole: tl.constexpr = tl.int32 if half == 16 else tl.int64
    return (key.to(whole) << half) | column.to(whole)


@triton.jit
def logit_and_class(key, kind: tl.constexpr):
    """Return what `key_of` has joined."""
    half: tl.constexpr = kind.primitive_bitwidth
    number: tl.constexpr = tl.int16 if half == 16 else tl.int32
    t = _rising(~((key >> half).to(number))).to(kind, bitcast=True)
    return t, (key & (0xFFFF if half == 16 else 0x7FFFFFFF)).to(tl.int32)


@triton.jit
def _exchange(key, distance: tl.constexpr, run: tl.constexpr, width: tl.constexpr, each: tl.constexpr):
    """Order pairs of keys `distance` apart, in runs of `run` that rise and fall in turn; rows end rising."""
    pairs: tl.constexpr = key.shape[0] // (2 * distance)
    x = tl.reshape(key, (pairs, 2, distance))
    other = tl.sum(x, 1, keep_dims=True) - x  # exact: integers wrap around in both operations
    second = tl.arange(0, 2)[None, :, None] == 1
    swap = (x > other) != second
    if distance < each:
        swap = tl.where(second, other > x, x > other)  # one comparison serves both, which are in one thread
    if run < width:
        swap = swap != (tl.arange(0, pairs)[:, None, None] * (2 * distance) // run % 2 == 1)
    return tl.reshape(tl.where(swap, other, x), key.shape)


@triton.jit
def in_order(key, height: tl.constexpr, width: tl.constexpr):
    """Sort the keys of every row, the lowest first, neighbours in one thread: a bitonic sort.

    `tl.sort` takes a third more instructions, since it compares each pair twice.
    """
    each: tl.constexpr = key.shape[0]
    key = tl.reshape(tl.permute(key, (1, 2, 0)), (height * width,))
    for i in tl.static_range(1, 32):
        if 2**i <= width:
            for j in tl.static_range(i):
                key = _exchange(key, 2 ** (i - 1 - j), 2**i, width, each)
    return tl.permute(tl.reshape(key, (height, width // each, each)), (2, 0, 1))
