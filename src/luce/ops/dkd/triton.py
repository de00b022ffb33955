"""Decoupled KD in Triton; csrc/kernels/dkd.cpp explains the formulas."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..fused import empty_results
from ..triton.launch import check_rows, launch, split_number, strides, wide_type
from ..triton.math import number, row_expm1, row_log1p
from ..triton.pair import are_short, better_rest, classes_of, excess, load_pair, normalise
from ..triton.rows import load_label, rows_of, starts_of, store_classes, weights_of


@triton.jit
def _softplus(x):
    return tl.maximum(x, 0.0) + row_log1p(tl.exp(-tl.abs(x)))


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _odds(teacher, student, apart, wide: tl.constexpr):
    """Return the divergence of (p, 1 - p) and (q, 1 - q), and q - p, from the log odds of the label.

    Args:
        teacher: The teacher's log odds, float64.
        student: The student's log odds, float64.
        apart: The teacher's less the student's to the last digit, which their difference would not give.
    """
    near = tl.abs(apart) < 30.0  # further apart, expm1 and log1p may overflow, and nothing cancels
    small = tl.where(near, apart, 0.0)
    p, rest = _sigmoid(teacher), _sigmoid(-teacher)
    far_d = _softplus(-student) - _softplus(-teacher)
    far_rest = _softplus(student) - _softplus(teacher)
    d = tl.where(near, row_log1p(rest * row_expm1(small)), far_d)  # log p - log q
    d_rest = tl.where(near, row_log1p(p * row_expm1(-small)), far_rest)
    terms = tl.where(p.to(wide) > 0.0, p * d, 0.0) + tl.where(rest.to(wide) > 0.0, rest * d_rest, 0.0)
    close = tl.abs(apart) < 0.1  # the two terms above would cancel; those of the series are not negative
    series = p * excess(tl.where(close, d, 0.0)) + rest * excess(tl.where(close, d_rest, 0.0))
    value = tl.where(close, series, tl.maximum(terms, 0.0))
    far = tl.where(teacher > 0.0, rest - _sigmoid(-student), _sigmoid(student) - p)
    return value, tl.where(near, p * row_expm1(-d), far)


@triton.jit(do_not_specialize=["outer"])
def _kernel(
    teacher, student, target, weight, values, gradient, outer, classes, inner,
    t_n, t_c, t_m, s_n, s_c, s_m, g_n, g_c, g_m,
    temperature_high, temperature_low, alpha_high, alpha_low, beta_high, beta_low,
    height: tl.constexpr, width: tl.constexpr, wide: tl.constexpr, short: tl.constexpr,
):  # fmt: skip
    row, n, m, exists = rows_of(outer, inner, height)
    w = weights_of(weight, row, exists)
    look = w != 0.0
    teacher = starts_of(teacher, n, m, t_n, t_m)
    student = starts_of(student, n, m, s_n, s_m)
    if gradient is not None:
        gradient = starts_of(gradient, n, m, g_n, g_m)
    temperature = 0.25 * number(temperature_high, temperature_low)
    softness = (1.0 / temperature).to(wide)
    doublings = (1.4426950408889634 / temperature).to(wide)
    alpha, beta = number(alpha_high, alpha_low), number(beta_high, beta_low)
    epsilon = 2.3e-16 if wide == tl.float64 else 1.2e-7

    label = tl.load(target + row, mask=look, other=0)
    named = (label >= 0) & (label < classes)
    t_label = 0.25 * load_label(teacher, t_c, label, look & named)
    s_label = 0.25 * load_label(student, s_c, label, look & named)
    no_t_label, no_s_label = t_label == float("-inf"), s_label == float("-inf")
    defined = named & (t_label < float("inf")) & (s_label < float("inf")) & ((no_t_label & no_s_label) == 0)

    # The rest is the row without its label.
    top_t, z_t, top_s, z_s = normalise(
        teacher, t_c, student, s_c, classes, look, label, doublings, height, width, wide
    )
    # A network whose rest is empty borrows the other's, to keep the formulas finite; its odds are infinite.
    no_t, no_s = z_t == 0.0, z_s == 0.0
    alone = no_t & no_s
    top_t, top_s = tl.where(no_t, top_s, top_t), tl.where(no_s, top_t, top_s)
    z_t, z_s = tl.where(no_t, z_s, z_t), tl.where(no_s, z_t, z_s)
    z_t, z_s = tl.where(alone, 1.0, z_t), tl.where(alone, 1.0, z_s)
    defined = defined & (z_t > 0.0) & (z_s > 0.0) & ((no_t & no_t_label) == 0) & ((no_s & no_s_label) == 0)
    over_t, over_s = (1.0 / z_t).to(wide), (1.0 / z_s).to(wide)
    tops = top_t.to(tl.float64) - top_s.to(tl.float64)
    rest = temperature * tl.log(z_t / z_s)
    scale = tl.where(defined, 0.25 * w / temperature, float("nan"))
    of_rest = (beta * scale).to(wide)
    log_z = top_t.to(tl.float64) / temperature + tl.log(z_t)
    t_odds = tl.where(no_t, float("inf"), t_label / temperature - log_z)

    among = tl.zeros([height], tl.float64)
    between = tl.zeros([height], tl.float64)
    tiles = tl.cdiv(classes, width)
    wrong = tl.full([height], 1, tl.int32)
    for attempt in range(2):  # again if the surplus shows that the normalisers are not exact enough
        if tl.max(wrong, 0) > 0:
            s_odds = s_label / temperature - (log_z - (tops + rest) / temperature)
            s_odds = tl.where(no_s, float("inf"), s_odds)
            apart = (t_label - s_label - tops - rest) / temperature
            apart = tl.where(no_s, float("-inf"), tl.where(no_t, float("inf"), apart))
            between, slope_label = _odds(t_odds, s_odds, apart, wide)
            of_label = tl.where(alone, 0.0, alpha * slope_label * scale).to(wide)
            among = tl.zeros([height], tl.float64)
            surplus = tl.zeros([height], tl.float64)
            size = tl.zeros([height], tl.float64)
            for back in range(0, tiles):  # from the end: the tiles read last may still be in the cache
                column = (tiles - 1 - back) * width + tl.arange(0, width)
                a, b = load_pair(teacher, t_c, student, s_c, column, classes, look, label, wide)
                a, b = tl.where(no_t[:, None], b, a), tl.where(no_s[:, None], a, b)
                _p, q, _d, h, term = classes_of(
                    a, b, top_t, top_s, over_t, over_s, tops, rest, softness, doublings, short
                )
                surplus += tl.sum(h, 1).to(tl.float64)
                size += tl.sum(tl.abs(h), 1).to(tl.float64)
                among += tl.sum(term, 1).to(tl.float64)
                if gradient is not None:
                    slope = h * of_rest[:, None] - q * of_label[:, None]
                    slope = tl.where(column[None, :] == label[:, None], of_label[:, None], slope)
                    if weight is not None:
                        slope = tl.where(look[:, None], slope, 0.0)
                    store_classes(gradient, g_c, column, classes, exists, slope)
            better = better_rest(rest, surplus, size, temperature, epsilon)
            wrong = (look & (attempt == 0) & (better != rest)).to(tl.int32)
            rest = tl.where(wrong > 0, better, rest)

    among = tl.where(no_s, float("inf"), among)
    # A part of weight 0 may be infinite: 0 times it would be NaN.
    value = tl.where(alpha != 0.0, alpha * between, 0.0) + tl.where(beta != 0.0, beta * among, 0.0)
    value = tl.where(alone, 0.0, value)
    value = tl.where(defined, value, float("nan"))
    tl.store(values + row, tl.where(look, value * w, 0.0), mask=exists)


def dkd(
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    weight: Tensor | None,
    temperature: float,
    alpha: float,
    beta: float,
    needs_gradient: bool,
) -> tuple[Tensor, Tensor]:
    check_rows(student, teacher, target=target, weight=weight)
    values, gradient = empty_results(student, teacher, needs_gradient)
    asked = gradient if needs_gradient else None
    numbers: list[float] = [*strides(teacher), *strides(student), *strides(asked)]
    numbers += [half for x in (temperature, alpha, beta) for half in split_number(x)]
    tensors = (teacher, student, target, weight, values, asked)
    options = {"wide": wide_type(student, teacher), "short": are_short(student, teacher)}
    launch(_kernel, student, *tensors, after=numbers, **options)
    return values, gradient
