"""Functions of full precision for kernels.

Triton's `exp` and `log` of float32 are the hardware's: fast, but they lose digits far from 0 and near 1. The
functions here use the hardware only for powers of 2 between -1/2 and 1/2 and compute the rest themselves. The
names that begin with `row_` take float64, for numbers of which a row has one.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def number(high, low):
    """Join in float64 what `split_number` has split."""
    return tl.full([], high, tl.float64) + tl.full([], low, tl.float64)


@triton.jit
def whole_part(t):
    """Split t >= -127 into n + f with |f| <= 1/2; return n and 2^n, which is 0 for n = -127."""
    # 1.5 * 2^23 leaves no bits behind the point: the addition rounds to the nearest integer, and that integer
    # stands in the low bits. Reassociating the two additions would undo this.
    shifted = t + 12582912.0
    scale = (shifted.to(tl.int32, bitcast=True) << 23) + (127 << 23)
    return shifted - 12582912.0, scale.to(tl.float32, bitcast=True)


@triton.jit
def exp(x):
    """Return e^x to 3 ULP for x <= 88; 0 where it would not be a normal number, NaN for infinity."""
    if x.dtype == tl.float64:
        e = tl.exp(x)
    else:
        t = tl.maximum(x * 1.4426950408889634, -127.0, propagate_nan=tl.PropagateNan.ALL)
        n, scale = whole_part(t)
        # log2(e) in two numbers: the first alone would shift the exponent of a large x by |x| * 2e-8. What
        # remains is at most 1/2, where the hardware's power of 2 is exact to 2 ULP.
        f = tl.fma(x, 1.925963033500e-8, tl.fma(x, 1.4426950216293335, -n))
        e = tl.exp2(f) * scale
    return e


@triton.jit
def power(x, k):
    """Return 2^(x k) with the precision of `exp`, k being what float32 holds of it."""
    if x.dtype == tl.float64:
        e = tl.exp2(x * k)
    else:
        n, scale = whole_part(tl.maximum(x * k, -127.0, propagate_nan=tl.PropagateNan.ALL))
        e = tl.exp2(tl.fma(x, k, -n)) * scale
    return e


@triton.jit
def split(x):
    """Write a normal x > 0 as 2^e (1 + f) with 1 + f between sqrt(1/2) and sqrt(2); return e and f.

    Powers of 2 are split off around 1 instead of from 1 on: just below 1 the logarithm would otherwise be the
    difference of log 2 and almost log 2.
    """
    if x.dtype == tl.float64:
        bits = x.to(tl.int64, bitcast=True)
        whole = (bits - 0x3FE6A09E667F3BCD) >> 52  # the bits of sqrt(1/2)
        f = (bits - (whole << 52)).to(tl.float64, bitcast=True) - 1.0
    else:
        bits = x.to(tl.int32, bitcast=True)
        whole = (bits - 0x3F3504F3) >> 23
        f = (bits - (whole << 23)).to(tl.float32, bitcast=True) - 1.0
    return whole.to(x.dtype), f


@triton.jit
def log1p_rest(f):
    """Return log(1 + f) - f for sqrt(1/2) <= 1 + f <= sqrt(2).

    Without f, which the caller adds last: near 0 it is almost all of the logarithm, and exact.
    """
    if f.dtype == tl.float64:
        s = f / (2.0 + f)
        z = s * s
        half = 0.5 * f * f
        r = z * 1.479819860511658591e-01 + 1.531383769920937332e-01
        r = r * z + 1.818357216161805012e-01
        r = r * z + 2.222219843214978396e-01
        r = r * z + 2.857142874366239149e-01
        r = r * z + 3.999999999940941908e-01
        r = r * z + 6.666666666666735130e-01
        rest = s * (half + r * z) - half
    else:
        p = f * 7.0376836292e-2 - 1.1514610310e-1
        p = p * f + 1.1676998740e-1
        p = p * f - 1.2420140846e-1
        p = p * f + 1.4249322787e-1
        p = p * f - 1.6668057665e-1
        p = p * f + 2.0000714765e-1
        p = p * f - 2.4999993993e-1
        p = p * f + 3.3333331174e-1
        rest = (p * f - 0.5) * (f * f)
    return rest


@triton.jit
def times_ln2(e, rest):
    """Return e log 2 + rest for an integer e."""
    # log 2 in two numbers, the first so short that its product with e is exact: one rounding less.
    if e.dtype == tl.float64:
        x = e * 0.6931471805582987 + (e * 1.646594958289708e-12 + rest)
    else:
        x = e * 0.693145751953125 + (e * 1.428606765330187e-06 + rest)
    return x


@triton.jit
def log(x):
    """Return the logarithm of normal numbers above 0."""
    e, f = split(x)
    return times_ln2(e, f + log1p_rest(f))


@triton.jit
def log1p(x):
    """Return log(1 + x) for x >= 0."""
    e, f = split(1.0 + x)
    f = tl.where(x < 0.25, x, f)  # exact, where 1 + x has rounded x
    return times_ln2(e, f + log1p_rest(f))


@triton.jit
def row_log1p(x):
    """Return log(1 + x) of float64."""
    u = 1.0 + x
    same = (u == 1.0) | (u == float("inf"))
    # Kahan's form: the error that rounding makes in u is the same in log(u) and in u - 1, and cancels.
    return tl.where(same, tl.where(u == 1.0, x, u), tl.log(u) * (x / tl.where(same, 1.0, u - 1.0)))


@triton.jit
def row_expm1(x):
    """Return exp(x) - 1 of float64, by Kahan's form as in `row_log1p`."""
    u = tl.exp(x)
    same = (u == 1.0) | (u == 0.0)
    return tl.where(same, tl.where(u == 1.0, x, -1.0), (u - 1.0) * (x / tl.log(tl.where(same, 2.0, u))))


@triton.jit
def _add_exactly(a_high, a_low, b_high, b_low):
    """Add two pairs of float32 by Knuth's two-sum: `low` collects what rounding `high` lost."""
    total = a_high + b_high
    back = total - a_high
    return total, (a_low + b_low) + ((a_high - (total - back)) + (b_high - back))


@triton.jit
def sum_exactly(x):
    """Return the sums of a tile's rows in float64, without the roundings of a float32 sum.

    For sums whose terms cancel: of a float32 sum, little but its roundings would remain.
    """
    if x.dtype == tl.float64:
        total = tl.sum(x, 1)
    else:
        high, low = tl.reduce((x, tl.zeros_like(x)), 1, _add_exactly)
        total = high.to(tl.float64) + low.to(tl.float64)
    return total


@triton.jit
def finite_top(top):
    """Return what to subtract from a row's logits: their maximum, or 0 if all are -inf."""
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def add_exponentials(top, total, x, softness):
    """Add a tile to a running maximum and a sum of exponentials relative to it."""
    new = tl.maximum(top, tl.max(x, 1))
    base = finite_top(new)
    fewer = total * exp((top - base) * softness).to(tl.float64)
    return new, fewer + tl.sum(exp((x - base[:, None]) * softness), 1).to(tl.float64)
