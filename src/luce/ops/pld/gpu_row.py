"""What PLD's kernels in Triton say of a row and of a place in it."""

from __future__ import annotations

import triton
import triton.language as tl

from .._triton import log1p_rest, split, times_ln2


@triton.jit
def choice(s, alpha, own, behind, e):
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
def described(top_s, top_t, spoilt, label, label_s, label_t, classes):
    """Whether a row has a meaning: no NaN, no +inf, networks with classes, and a label that exists."""
    inf = float("inf")
    excluded = (label_s == -inf) & (label_t == -inf)
    label_exists = (label == -1) | ((label >= 0) & (label < classes) & (excluded == 0))
    return (spoilt == 0) & (tl.abs(top_s) < inf) & (tl.abs(top_t) < inf) & label_exists


@triton.jit
def label_of(target, row, look):
    if target is None:
        label = tl.where(look, -1, -1).to(tl.int64)
    else:
        label = tl.load(target + row, mask=look, other=-1)
    return label


@triton.jit
def store_row(values, bound, row, exists, look, defined, loss, w):
    value = tl.where(look, tl.where(defined, loss, float("nan")) * w, 0.0)
    tl.store(values + row, value, mask=exists)
    nothing = tl.where(look & (defined == 0), float("nan"), 0.0)
    tl.store(bound + 2 * row, nothing, mask=exists)
    tl.store(bound + 2 * row + 1, nothing, mask=exists)
