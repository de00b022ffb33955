"""Two distributions over the same classes, in Triton; as csrc/kernels/pair.h, which explains the formulas.

p is the softmax of the first logits over the temperature T, q that of the second ones. Logits come a quarter
of their size, and `softness` is 4/T: the difference of any two of them is then a number of float32 as well.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._triton import add_exponentials, exp, finite_top, load_logits, row_log1p


@triton.jit
def load_pair(
    first, f_c, second, s_c, column, classes, look, label, wide: tl.constexpr
):  # fmt: skip
    """A quarter of both networks' logits, with `label`, if there is one, taken out."""
    a = 0.25 * load_logits(first, f_c, column, classes, look, wide)
    b = 0.25 * load_logits(second, s_c, column, classes, look, wide)
    if label is not None:
        is_label = column[None, :] == label[:, None]
        a = tl.where(is_label, float("-inf"), a)
        b = tl.where(is_label, float("-inf"), b)
    return a, b


@triton.jit
def normalise(
    first,
    f_c,
    second,
    s_c,
    classes,
    look,
    label,
    softness,
    height: tl.constexpr,
    width: tl.constexpr,
    wide: tl.constexpr,
):
    """Each network's largest logit and the sum of exponentials over its own: 0 or NaN for none."""
    top_a = tl.full([height], float("-inf"), wide)
    top_b = tl.full([height], float("-inf"), wide)
    z_a = tl.zeros([height], tl.float64)
    z_b = tl.zeros([height], tl.float64)
    for start in range(0, classes, width):
        column = start + tl.arange(0, width)
        a, b = load_pair(first, f_c, second, s_c, column, classes, look, label, wide)
        top_a, z_a = add_exponentials(top_a, z_a, a, softness)
        top_b, z_b = add_exponentials(top_b, z_b, b, softness)
    return finite_top(top_a), z_a, finite_top(top_b), z_b


@triton.jit
def excess(d):
    """d + exp(-d) - 1 for |d| <= 1: its series."""
    if d.dtype == tl.float64:
        total = 1.0 / 6402373705728000 - d * 0.0
        total = 1.0 / 355687428096000 - d * total
        total = 1.0 / 20922789888000 - d * total
        total = 1.0 / 1307674368000 - d * total
        total = 1.0 / 87178291200 - d * total
        total = 1.0 / 6227020800 - d * total
        total = 1.0 / 479001600 - d * total
        total = 1.0 / 39916800 - d * total
        total = 1.0 / 3628800 - d * total
    else:
        total = 1.0 / 3628800 - d * 0.0
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
def difference(a, b, tops, rest, softness):
    """log p - log q to the last digit: differences are held in two numbers.

    Args:
        tops: ``(height,)`` float64, by how much the first network's largest logit is larger.
        rest: Likewise of what else the normalisers differ by.
    """
    if a.dtype == tl.float64:
        d = ((a - b) - tops[:, None] - rest[:, None]) * softness
    else:
        high = a - b
        back = high - a
        low = (a - (high - back)) - (b + back)
        tops_high = tops.to(tl.float32)
        rest_high = rest.to(tl.float32)
        tops_low = (tops - tops_high.to(tl.float64)).to(tl.float32)
        rest_low = (rest - rest_high.to(tl.float64)).to(tl.float32)
        high = (high - tops_high[:, None]) - rest_high[:, None]
        low = (low - tops_low[:, None]) - rest_low[:, None]
        d = (high + low) * softness
    return d


@triton.jit
def classes_of(a, b, top_a, top_b, over_a, over_b, tops, rest, softness):
    """p, q, d = log p - log q, h = q - p, and the terms p (d + exp(-d) - 1) of the divergence of q from p.

    Args:
        over_a: ``(height,)``, what the first exponentials are multiplied by to be probabilities.
        over_b: Likewise.
    """
    p = exp((a - top_a[:, None]) * softness) * over_a[:, None]
    q = exp((b - top_b[:, None]) * softness) * over_b[:, None]
    lowest = -4e307 if a.dtype == tl.float64 else -8.5e37
    # -inf - -inf is no number.
    d = difference(tl.maximum(a, lowest), tl.maximum(b, lowest), tops, rest, softness)
    close = tl.abs(d) <= 1.0
    series = excess(tl.where(close, d, 0.0))
    h = tl.where(close, p * (series - d), q - p)
    term = tl.where(close, p * series, tl.where(p > 0.0, p * d, 0.0) + h)
    return p, q, d, h, term


@triton.jit
def better_rest(rest, surplus, size, temperature, epsilon):
    """The normalisers put right by the sum of q - p, which should be 0, where its size asks for it."""
    worse = tl.abs(surplus) > 8.0 * epsilon * size
    return tl.where(worse, rest - temperature * row_log1p(surplus), rest)
