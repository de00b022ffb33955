"""Two distributions over the same classes, as in csrc/kernels/pair.h, which explains the formulas.

p is the softmax of the first network's logits over the temperature T, q that of the second's. Logits enter at
a quarter of their size, so that the difference of any two float32 numbers stays in float32's range.
`softness` is 4/T, and `doublings` is `softness` over log 2.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .math import finite_top, power, row_log1p, whole_part
from .rows import load_possible


def are_short(student: Tensor, teacher: Tensor) -> bool:
    """Return whether all logits have 16 bits: float32 then holds the difference of two close logits exactly.

    An exception are classes whose logits are thousands of times closer to 0 than the largest. Networks that
    differ in such classes alone lose digits of a divergence of 1e-12 or less.
    """
    return student.dtype.itemsize == teacher.dtype.itemsize == 2


@triton.jit
def load_pair(
    first, f_c, second, s_c, column, classes, look, label, wide: tl.constexpr
):  # fmt: skip
    """Load both networks' logits, the label's replaced by -inf if `label` is given."""
    a = load_possible(first, f_c, column, classes, look, wide)
    b = load_possible(second, s_c, column, classes, look, wide)
    if label is not None:
        is_label = column[None, :] == label[:, None]
        a = tl.where(is_label, float("-inf"), a)
        b = tl.where(is_label, float("-inf"), b)
    return a, b


@triton.jit
def normalise(
    first, f_c, second, s_c, classes, look, label, doublings,
    height: tl.constexpr, width: tl.constexpr, wide: tl.constexpr,
):  # fmt: skip
    """Return, for each network, a quarter of the largest logit and the sum of exponentials relative to it.

    The sum is 0 for a row without classes and NaN for one with NaN or +inf.
    """
    doublings = 0.25 * doublings
    top_a = tl.full([height], float("-inf"), wide)
    top_b = tl.full([height], float("-inf"), wide)
    z_a = tl.zeros([height], tl.float64)
    z_b = tl.zeros([height], tl.float64)
    for start in range(0, classes, width):
        column = start + tl.arange(0, width)
        a, b = load_pair(first, f_c, second, s_c, column, classes, look, label, wide)
        top_a, z_a = _add_powers(top_a, z_a, a, doublings)
        top_b, z_b = _add_powers(top_b, z_b, b, doublings)
    return 0.25 * finite_top(top_a), z_a, 0.25 * finite_top(top_b), z_b


@triton.jit
def _add_powers(top, total, x, doublings):
    """Add a tile to a running maximum and a sum of exponentials relative to it."""
    new = tl.maximum(top, tl.max(x, 1))
    base = finite_top(new)
    fewer = total * power(top - base, doublings).to(tl.float64)
    # The hardware's power of 2 suffices: it loses digits far below 0, where terms hardly add to the sum.
    return new, fewer + tl.sum(tl.exp2((x - base[:, None]) * doublings), 1).to(tl.float64)


@triton.jit
def excess(d):
    """Return d + exp(-d) - 1 for |d| <= 1 by its series to float64: the sum itself would cancel near 0."""
    total = 1.0 / 6402373705728000 - d * 0.0
    total = 1.0 / 355687428096000 - d * total
    total = 1.0 / 20922789888000 - d * total
    total = 1.0 / 1307674368000 - d * total
    total = 1.0 / 87178291200 - d * total
    total = 1.0 / 6227020800 - d * total
    total = 1.0 / 479001600 - d * total
    total = 1.0 / 39916800 - d * total
    total = 1.0 / 3628800 - d * total
    total = 1.0 / 362880 - d * total
    total = 1.0 / 40320 - d * total
    total = 1.0 / 5040 - d * total
    total = 1.0 / 720 - d * total
    total = 1.0 / 120 - d * total
    total = 1.0 / 24 - d * total
    total = 1.0 / 6 - d * total
    total = 1.0 / 2 - d * total
    return total * (d * d)


@triton.jit
def fall(u):
    """Return m = exp(-u) - 1 for 0 <= u <= 88, whether u + m cancels, and u + m to the last digit if so."""
    if u.dtype == tl.float64:
        near = u <= 1.0
        both = excess(tl.where(near, u, 0.0))
        m = tl.where(near, both - u, tl.exp(-u) - 1.0)
    else:
        n, scale = whole_part(u * -1.4426950408889634)
        near = n == 0.0
        # log 2 in two numbers: r keeps the digits that u loses to n log 2.
        r = tl.fma(n, -1.428606765330187e-06, tl.fma(n, -0.693145751953125, -u))
        # exp(r) - 1 - r, to 1.3e-7 of it.
        both = r * 0.0013901351485401392 + 0.008363300003111362
        both = both * r + 0.04166685417294502
        both = both * r + 0.16666576266288757
        both = (both * r + 0.5) * (r * r)
        m = (r + both) * scale + (scale - 1.0)
    return m, near, both


@triton.jit
def difference(a, b, tops, rest):
    """Return (log p - log q) T/4 to the last digit.

    All parts are of the size of the logits and may cancel to almost nothing. So each is held in two numbers,
    and the small halves are added last.

    Args:
        tops: ``(height,)`` float64, how much larger the first network's largest logit is.
        rest: Same shape, what else the normalisers differ by.
    """
    if a.dtype == tl.float64:
        d = (a - b) - tops[:, None] - rest[:, None]
    else:
        high = a - b
        back = high - a
        low = (a - (high - back)) - (b + back)
        tops_high = tops.to(tl.float32)
        rest_high = rest.to(tl.float32)
        lost = ((tops - tops_high.to(tl.float64)) + (rest - rest_high.to(tl.float64))).to(tl.float32)
        d = ((high - tops_high[:, None]) - rest_high[:, None]) + (low - lost[:, None])
    return d


@triton.jit
def classes_of(
    a, b, top_a, top_b, over_a, over_b, tops, rest, softness, doublings, short: tl.constexpr
):  # fmt: skip
    """Return p, q, d = log p - log q, h = q - p, and the terms p (d + exp(-d) - 1) of the divergence.

    The larger of p and q is an exponential of its logit, the smaller one is exp(-|d|) times that. So h is
    never a difference of two rounded probabilities.

    Args:
        over_a: ``(height,)``, one over the first network's sum of exponentials.
        over_b: Likewise of the second.
        short: `are_short`.
    """
    lowest = -4e307 if a.dtype == tl.float64 else -8.5e37
    possible = b > float("-inf")
    # Excluded classes get the lowest logit whose difference to any other is finite: -inf - -inf is NaN.
    a, b = tl.maximum(0.25 * a, lowest), tl.maximum(0.25 * b, lowest)
    x, y = a - top_a[:, None], b - top_b[:, None]
    d = (x - y) - rest.to(a.dtype)[:, None] if short else difference(a, b, tops, rest)
    d = d * softness
    of_a = d >= 0.0
    larger = power(tl.where(of_a, x, y), doublings)
    larger = larger * tl.where(of_a, over_a[:, None], over_b[:, None])
    u = tl.abs(d)
    bounded = tl.minimum(u, 88.0)
    m, near, both = fall(bounded)
    smaller = larger + larger * m
    p, q = tl.where(of_a, larger, smaller), tl.where(of_a, smaller, larger)
    change = larger * m
    h = tl.where(of_a, change, -change)
    # Where p is the larger one, q may be 0: the term is then infinite unless p is 0 as well.
    u = tl.where(of_a, tl.where(possible, u, float("inf")), bounded)
    both = tl.where(near, both, u + m)
    term = tl.where(larger > 0.0, larger * tl.where(of_a, both, -(both + m * u)), 0.0)
    return p, q, d, h, term


@triton.jit
def better_rest(rest, surplus, size, temperature, epsilon):
    """Correct the normalisers by the sum of q - p, which should be 0.

    A sum within 8 epsilon of the terms' size may be rounding alone, and correcting by it would cost a second
    pass over the row without a gain.
    """
    worse = tl.abs(surplus) > 8.0 * epsilon * size
    return tl.where(worse, rest - temperature * row_log1p(surplus), rest)
