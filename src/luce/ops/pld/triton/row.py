"""Parts of PLD's kernels that concern one place, or a whole row."""

from __future__ import annotations

import triton
import triton.language as tl

from ...triton.math import log1p_rest, split, times_ln2


@triton.jit
def choice(s, alpha, own, behind, e):
    """Evaluate a place: its class weighs `own`, those behind it together `behind`, on the scale e.

    Returns:
        The place's term of the loss, alpha/Z (on the scale -e), and alpha times the share of all behind it.
    """
    z = own + behind
    empty = z == 0.0
    z = tl.where(empty, 1.0, z)
    over = 1.0 / z
    p = own * over
    rest = tl.where(empty, 1.0, behind * over)
    x = s - e
    near = x > -60.0  # well before p underflows, -log p is taken as log Z - x
    n, f = split(tl.where(near, p, z))
    # log(1 - rest): p itself has rounded away a small rest, which is the whole loss of an easy place.
    f = tl.where(near & (n == 0.0), -rest, f)
    nll = times_ln2(n, f + log1p_rest(f))
    nll = tl.where(near, -nll, nll - x)
    nll = tl.where(s == float("-inf"), float("inf"), nll)
    counts = alpha > 0.0
    part = tl.where(counts, alpha * tl.where(counts, nll, 0.0), 0.0)
    return part, tl.where(empty, 0.0, alpha * over), alpha * rest


@triton.jit
def described(top_s, top_t, spoilt, label, label_s, label_t, classes):
    """Return whether a row has a value: no NaN or +inf, a class in each network, and a label that exists."""
    inf = float("inf")
    excluded = (label_s == -inf) & (label_t == -inf)
    label_exists = (label == -1) | ((label >= 0) & (label < classes) & (excluded == 0))
    return (spoilt == 0) & (tl.abs(top_s) < inf) & (tl.abs(top_t) < inf) & label_exists


@triton.jit
def label_of(target, row, look):
    """Return the rows' labels; -1 in rows without one and in rows that are skipped."""
    if target is None:
        label = tl.where(look, -1, -1).to(tl.int64)
    else:
        label = tl.load(target + row, mask=look, other=-1)
    return label


@triton.jit
def store_row(values, bound, row, exists, look, defined, loss, w):
    """Store a row's value, and its bound of 0: these kernels leave no class unsorted."""
    value = tl.where(look, tl.where(defined, loss, float("nan")) * w, 0.0)
    tl.store(values + row, value, mask=exists)
    nothing = tl.where(look & (defined == 0), float("nan"), 0.0)
    tl.store(bound + 2 * row, nothing, mask=exists)
    tl.store(bound + 2 * row + 1, nothing, mask=exists)
