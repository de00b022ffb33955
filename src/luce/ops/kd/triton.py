"""The divergences in Triton; csrc/kernels/divergence.cpp explains the formulas."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..fused import empty_results
from ..triton.launch import check_rows, launch, split_number, strides, wide_type
from ..triton.math import log1p_rest, number, split, sum_exactly, times_ln2
from ..triton.pair import are_short, better_rest, classes_of, load_pair, normalise
from ..triton.rows import load_logits, rows_of, starts_of, store_classes, weights_of
from .reference import KINDS


@triton.jit
def _entropy_term(whole, u):
    """Return (1 + u) log(1 + u) - u, which is about u^2/2 near 0, and the logarithm; `whole` is 1 + u."""
    e, f = split(whole)
    near = e == 0.0
    reduced = tl.where(near, u, f)
    rest = log1p_rest(reduced)
    logarithm = times_ln2(e, reduced + rest)
    # Near 0 the difference would cancel: with log(1 + u) = u + rest, u itself drops out.
    return tl.where(near, u * u + (1.0 + u) * rest, whole * logarithm - u), logarithm


@triton.jit
def _mixture(p, q, h, share):
    """Return a class's term of the Jensen-Shannon divergence, and log(q/m) for the mixture m."""
    other = 1.0 - share
    m = share * p + other * q
    counts = m >= (2.3e-308 if m.dtype == tl.float64 else 1.2e-38)  # below normal numbers 1/m may overflow
    over_m = 1.0 / tl.where(counts, m, 1.0)
    of_teacher, _ = _entropy_term(tl.where(counts, p * over_m, 1.0), -other * h * over_m)
    of_student, logarithm = _entropy_term(tl.where(counts, q * over_m, 1.0), share * h * over_m)
    return tl.where(counts, m * (share * of_teacher + other * of_student), 0.0), logarithm


@triton.jit(do_not_specialize=["outer"])
def _kernel(
    first, second, weight, values, gradient, outer, classes, inner,
    f_n, f_c, f_m, s_n, s_c, s_m, g_n, g_c, g_m, temperature_high, temperature_low, share_high, share_low,
    kind: tl.constexpr, height: tl.constexpr, width: tl.constexpr, wide: tl.constexpr, short: tl.constexpr,
):  # fmt: skip
    # p is the first network: the student in the reverse KL, otherwise the teacher.
    row, n, m, exists = rows_of(outer, inner, height)
    w = weights_of(weight, row, exists)
    look = w != 0.0
    first = starts_of(first, n, m, f_n, f_m)
    second = starts_of(second, n, m, s_n, s_m)
    if gradient is not None:
        gradient = starts_of(gradient, n, m, g_n, g_m)
    temperature = 0.25 * number(temperature_high, temperature_low)
    softness = (1.0 / temperature).to(wide)
    doublings = (1.4426950408889634 / temperature).to(wide)
    share = number(share_high, share_low).to(wide)
    epsilon = 2.3e-16 if wide == tl.float64 else 1.2e-7

    top_a, z_a, top_b, z_b = normalise(
        first, f_c, second, s_c, classes, look, None, doublings, height, width, wide
    )
    defined = (z_a > 0.0) & (z_b > 0.0)
    over_a, over_b = (1.0 / z_a).to(wide), (1.0 / z_b).to(wide)
    tops = top_a.to(tl.float64) - top_b.to(tl.float64)
    rest = temperature * tl.log(z_a / z_b)
    scale = tl.where(defined, 0.25 * w / temperature, float("nan")).to(wide)

    value = tl.zeros([height], tl.float64)
    mean = tl.zeros([height], tl.float64)
    tiles = tl.cdiv(classes, width)
    wrong = tl.full([height], 1, tl.int32)
    for attempt in range(2):  # again if the surplus shows that the normalisers are not exact enough
        if tl.max(wrong, 0) > 0:
            value = tl.zeros([height], tl.float64)
            mean = tl.zeros([height], tl.float64)
            surplus = tl.zeros([height], tl.float64)
            size = tl.zeros([height], tl.float64)
            for back in range(0, tiles):  # from the end: the tiles read last may still be in the cache
                column = (tiles - 1 - back) * width + tl.arange(0, width)
                a, b = load_pair(first, f_c, second, s_c, column, classes, look, None, wide)
                p, q, d, h, term = classes_of(
                    a, b, top_a, top_b, over_a, over_b, tops, rest, softness, doublings, short
                )
                surplus += tl.sum(h, 1).to(tl.float64)
                size += tl.sum(tl.abs(h), 1).to(tl.float64)
                if kind == "jsd":
                    term, logarithm = _mixture(p, q, h, share)
                    mean += sum_exactly(q * logarithm)
                elif kind == "reverse_kl":
                    mean += sum_exactly(tl.where(p > 0.0, p * d, 0.0))  # d may be infinite
                elif gradient is not None:
                    slope = h * scale[:, None]
                    if weight is not None:
                        slope = tl.where(look[:, None], slope, 0.0)
                    store_classes(gradient, g_c, column, classes, exists, slope)
                value += tl.sum(term, 1).to(tl.float64)
            better = better_rest(rest, surplus, size, temperature, epsilon)
            wrong = (look & (attempt == 0) & (better != rest)).to(tl.int32)
            rest = tl.where(wrong > 0, better, rest)

    value = tl.where(defined, value, float("nan"))
    tl.store(values + row, tl.where(look, value * w, 0.0), mask=exists)

    if kind != "forward_kl":  # noqa: SIM102 (decided when the kernel is compiled)
        if gradient is not None:
            if kind == "reverse_kl":
                mean = mean / (z_a * over_a.to(tl.float64))
                scale = tl.where(value == float("inf"), float("nan"), scale)
            else:
                mean = mean / (z_b * over_b.to(tl.float64))
                scale = (1.0 - share) * scale
            # The slopes d - mean sum to 0 over p: rounding the mean would add the same error to each class.
            high = mean.to(wide)
            low = (mean - high.to(tl.float64)).to(wide)
            for start in range(0, classes, width):
                column = start + tl.arange(0, width)
                a, b = load_pair(first, f_c, second, s_c, column, classes, look, None, wide)
                p, q, d, h, term = classes_of(
                    a, b, top_a, top_b, over_a, over_b, tops, rest, softness, doublings, short
                )
                if kind == "jsd":
                    _, d = _mixture(p, q, h, share)
                    p = q
                slope = p * ((d - high[:, None]) - low[:, None])
                slope = tl.where(p == 0.0, 0.0, slope) * scale[:, None]
                slope = tl.where(look[:, None], slope, 0.0)
                store_classes(gradient, g_c, column, classes, exists, slope)


@triton.jit(do_not_specialize=["outer"])
def _limit(
    student, teacher, weight, values, gradient, outer, classes, inner,
    s_n, s_c, s_m, t_n, t_c, t_m, g_n, g_c, g_m,
    height: tl.constexpr, width: tl.constexpr, wide: tl.constexpr,
):  # fmt: skip
    row, n, m, exists = rows_of(outer, inner, height)
    w = weights_of(weight, row, exists)
    look = w != 0.0
    student = starts_of(student, n, m, s_n, s_m)
    teacher = starts_of(teacher, n, m, t_n, t_m)
    total = tl.zeros([height], tl.float64)
    of_student = tl.zeros([height], tl.int32)
    of_teacher = tl.zeros([height], tl.int32)
    of_both = tl.zeros([height], tl.int32)
    spoilt = tl.zeros([height], tl.int32)
    for start in range(0, classes, width):
        column = start + tl.arange(0, width)
        s = load_logits(student, s_c, column, classes, look, wide)
        t = load_logits(teacher, t_c, column, classes, look, wide)
        shared, high, low = _apart(s, t)
        total += sum_exactly(high) + tl.sum(low, 1).to(tl.float64)
        of_student += tl.sum((s != float("-inf")).to(tl.int32), 1)
        of_teacher += tl.sum((t != float("-inf")).to(tl.int32), 1)
        of_both += tl.sum(shared.to(tl.int32), 1)
        infinite = (s == float("inf")) | (t == float("inf")) | (s != s) | (t != t)
        spoilt = tl.maximum(spoilt, tl.max(infinite.to(tl.int32), 1))
    count = tl.maximum(of_both, 1).to(tl.float64)
    mean = total / count
    mean_high = mean.to(wide)
    mean_low = (mean - mean_high.to(tl.float64)).to(wide)
    defined = (spoilt == 0) & (of_student > 0) & (of_teacher > 0)
    scale = tl.where(defined, 1024.0 * w / count, float("nan")).to(wide)
    if gradient is not None:
        gradient = starts_of(gradient, n, m, g_n, g_m)
    squares = tl.zeros([height], tl.float64)
    tiles = tl.cdiv(classes, width)
    for back in range(0, tiles):  # from the end: the tiles read last may still be in the cache
        column = (tiles - 1 - back) * width + tl.arange(0, width)
        s = load_logits(student, s_c, column, classes, look, wide)
        t = load_logits(teacher, t_c, column, classes, look, wide)
        shared, high, low = _apart(s, t)
        deviation = (high - mean_high[:, None]) + (low - mean_low[:, None])
        deviation = tl.where(shared, deviation, 0.0)
        squares += tl.sum(deviation * deviation, 1).to(tl.float64)
        if gradient is not None:
            slope = tl.where(look[:, None], deviation * scale[:, None], 0.0)
            store_classes(gradient, g_c, column, classes, exists, slope)
    value = tl.where(
        of_student + of_teacher > 2 * of_both, float("inf"), 1024.0 * 1024.0 * squares / (2.0 * count)
    )
    value = tl.where(defined, value, float("nan"))
    tl.store(values + row, tl.where(look, value * w, 0.0), mask=exists)


@triton.jit
def _apart(s, t):
    """Return where both networks have a class, and 1/1024 of the difference there in two numbers.

    The scale keeps differences, and squares that are divided by the number of classes only later, in
    float32's range.
    """
    shared = (s != float("-inf")) & (t != float("-inf"))
    s = tl.where(shared, s * 0.0009765625, 0.0)
    t = tl.where(shared, t * 0.0009765625, 0.0)
    high = s - t
    back = high - s
    return shared, high, (s - (high - back)) - (t + back)


def divergence(
    student: Tensor,
    teacher: Tensor,
    weight: Tensor | None,
    kind: int,
    temperature: float,
    beta: float,
    needs_gradient: bool,
) -> tuple[Tensor, Tensor]:
    check_rows(student, teacher, weight=weight)
    values, gradient = empty_results(student, teacher, needs_gradient)
    asked = gradient if needs_gradient else None
    pair = (student, teacher) if KINDS[kind] in ("reverse_kl", "limit") else (teacher, student)
    numbers: list[float] = [*strides(pair[0]), *strides(pair[1]), *strides(asked)]
    wide = wide_type(student, teacher)
    if KINDS[kind] == "limit":
        launch(_limit, student, *pair, weight, values, asked, after=numbers, wide=wide)
    else:
        numbers += [*split_number(temperature), *split_number(beta)]
        options = {"kind": KINDS[kind], "wide": wide, "short": are_short(*pair)}
        launch(_kernel, student, *pair, weight, values, asked, after=numbers, **options)
    return values, gradient
