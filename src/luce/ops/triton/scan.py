"""Sums of exponentials of very different sizes, and their scans.

A sum is a pair, mantissa * e^scale, whose scale is the largest logit in it: a part of a row keeps its digits,
however far it lies below the rest.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def add(mantissa, scale, other, other_scale):
    """Add two pairs."""
    d = scale - other_scale
    shrink = tl.exp(-tl.abs(d))  # Triton's own loses digits only where the addend is too small to matter
    more = d > 0.0
    total = tl.where(more, mantissa + other * shrink, mantissa * shrink + other)
    # Equal scales need no difference, which would be NaN for two infinite ones.
    return tl.where(scale == other_scale, mantissa + other, total), tl.maximum(scale, other_scale)


@triton.jit
def nothing(like):
    """Return the scale of an empty sum: the lowest finite number. A logit may have it as well."""
    return tl.zeros_like(like) - (
        1.7976931348623157e308 if like.dtype == tl.float64 else 3.4028234663852886e38
    )


@triton.jit
def suffixes(s, there):
    """Return sums of e^s from each place of a tile on, and of all places behind it; 0 for no classes."""
    there = there & (s > float("-inf"))
    z, e = tl.where(there, 1.0, 0.0).to(s.dtype), tl.where(there, s, nothing(s))
    z, e = tl.associative_scan((z, e), 1, add, reverse=True)
    place = tl.arange(0, s.shape[1])[None, :] + tl.zeros(s.shape, tl.int32)
    last = place == s.shape[1] - 1
    following = tl.minimum(place + 1, s.shape[1] - 1)
    behind = tl.where(last, 0.0, tl.gather(z, following, 1))
    return z, e, behind, tl.where(last, nothing(e), tl.gather(e, following, 1))


@triton.jit
def prefixes(ratio, e):
    """Return sums of ratio * e^-e up to each place of a tile, and of all places before it."""
    scale = tl.where(ratio != 0.0, -e, nothing(e))
    ratio, scale = tl.associative_scan((ratio, scale), 1, add)
    place = tl.arange(0, e.shape[1])[None, :] + tl.zeros(e.shape, tl.int32)
    preceding = tl.maximum(place - 1, 0)
    before = tl.where(place == 0, 0.0, tl.gather(ratio, preceding, 1))
    return ratio, scale, before, tl.where(place == 0, nothing(e), tl.gather(scale, preceding, 1))


@triton.jit
def at(x, place: tl.constexpr):
    """Return one column of a tile."""
    return tl.sum(tl.where((tl.arange(0, x.shape[1]) == place)[None, :], x, 0.0), 1)
