"""RKKD in Triton; csrc/kernels/rkkd.cpp explains the formulas.

A program compares a few classes i of one row with all others, `width` of them at a time. Each pair is
evaluated from both sides, so that every class sums its own gradient: this takes C^2 steps, also for the
clipped form, but no memory beyond the row, and no atomics, whose order of addition would differ between runs.
"""

from __future__ import annotations

import struct

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..fused import empty_results
from ..triton import launch
from ..triton.launch import check_rows, strides, wide_type
from ..triton.rows import narrowed

WIDTH, PAIRS = 64, 256
"""Classes that a program, one warp, compares with its own at a time, and the most pairs of such a tile."""


@triton.jit
def _decay(y):
    """Return e^-y and 1 - e^-y for y >= 0, both to rounding."""
    double: tl.constexpr = y.dtype == tl.float64
    last = 708.0 if double else 87.0
    gone = y > last
    y = tl.minimum(y, last)
    # 1.5 * 2^23 plus the exponent's bias (or 1.5 * 2^52): an addend is rounded to an integer, which a shift
    # moves to the place of the exponent.
    magic: tl.constexpr = 6755399441056767.0 if double else 12583039.0
    biased = magic - y * 1.4426950408889634
    n = biased - magic
    if double:
        t = (-y - n * 0.6931471805582987) - n * 1.646594958289708e-12
        scale = (biased.to(tl.int64, bitcast=True) << 52).to(tl.float64, bitcast=True)
        p = t * (1.0 / 6227020800) + 1.0 / 479001600
        p = p * t + 1.0 / 39916800
        p = p * t + 1.0 / 3628800
        p = p * t + 1.0 / 362880
        p = p * t + 1.0 / 40320
        p = p * t + 1.0 / 5040
        p = p * t + 1.0 / 720
    else:
        t = (-y - n * 0.693145751953125) - n * 1.428606765330187e-06
        scale = (biased.to(tl.int32, bitcast=True) << 23).to(tl.float32, bitcast=True)
        p = t * (1.0 / 5040) + 1.0 / 720
    p = p * t + 1.0 / 120
    p = p * t + 1.0 / 24
    p = p * t + 1.0 / 6
    p = p * t + 1.0 / 2
    p = p * t + 1.0
    q = p * t * scale
    return tl.where(gone, 0.0, q + scale), (1.0 - scale) - q


@triton.jit
def _with_sign(x, like):
    return tl.where(like < 0.0, -x, tl.where(like > 0.0, x, 0.0))


@triton.jit
def _pair(d_s, d_t, k, form: tl.constexpr):
    """Return the cost of a pair, and its slope in the student's difference over 4k (clipped: over k)."""
    opposed = (d_s < 0.0) != (d_t < 0.0)
    if form == 0:
        e_s, _ = _decay(tl.abs(d_s) * (2.0 * k))
        e_t, rest = _decay(tl.abs(d_t) * (2.0 * k))
        both = 1.0 / ((1.0 + e_s) * (1.0 + e_t))
        cost = 2.0 * both * tl.where(opposed, 1.0 + e_s * e_t, e_s + e_t)
        slope = tl.where(d_t < 0.0, -rest, rest) * e_s * both * (both * (1.0 + e_t))
    elif form == 1:
        e, _ = _decay(tl.abs(d_s) * (2.0 * k))
        half = 1.0 / (1.0 + e)
        cost = 2.0 * half * tl.where(opposed, 1.0, e)  # where d_t is 0, both sides together cost 2
        slope = _with_sign(e * half * half, d_t)
    elif form == 2:
        x = d_s * d_t
        x = tl.where(x == x, x, 0.0)  # 0 * inf: a tie in one network decides
        e, _ = _decay(tl.abs(x) * (2.0 * k))
        half = 1.0 / (1.0 + e)
        cost = 2.0 * half * tl.where(x < 0.0, 1.0, e)
        slope = tl.where(tl.abs(d_t) < float("inf"), d_t * (e * half * half), 0.0)
    else:
        x = d_s * k
        cost = 1.0 - _with_sign(tl.minimum(tl.maximum(x, -1.0), 1.0), d_t)
        slope = _with_sign(tl.where(tl.abs(x) < 1.0, 1.0, 0.0), d_t)
    return cost, slope


@triton.jit
def _load(row, class_stride, column, seen, wide: tl.constexpr):
    """Load classes of a row; -inf past the last."""
    x = tl.load(row + column.to(tl.int64) * class_stride, mask=column < seen, other=float("-inf"))
    if x.dtype.primitive_bitwidth == 16:
        x = x.to(tl.float32)
    return x.to(wide)


@triton.jit(do_not_specialize=["bits"])
def _kernel(
    student, teacher, weight, parts, gradient, classes, inner,
    s_n, s_c, s_m, t_n, t_c, t_m, g_n, g_c, g_m, bits,
    form: tl.constexpr, height: tl.constexpr, width: tl.constexpr, wide: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    tiles = tl.cdiv(classes, height)
    row = program // tiles
    n = row // inner
    m = row % inner
    student += n * s_n + m * s_m
    teacher += n * t_n + m * t_m
    w = tl.full([], 1.0, tl.float64) if weight is None else tl.load(weight + row).to(tl.float64)
    seen = tl.where(w != 0.0, classes, 0)  # rows of weight 0 are skipped
    steepness = bits.to(tl.int64).to(tl.float64, bitcast=True)
    k = tl.minimum(steepness, 8e307 if wide == tl.float64 else 1e38).to(wide)

    i = (program % tiles).to(tl.int32) * height + tl.arange(0, height)
    s_i, t_i = _load(student, s_c, i, seen, wide), _load(teacher, t_c, i, seen, wide)
    costs = tl.zeros([height], tl.float64)
    gains = tl.zeros([height], tl.float64)
    present = tl.zeros([width], tl.int32)
    spoilt = tl.zeros([width], tl.int32)
    for start in range(0, seen, width):
        j = start + tl.arange(0, width)
        s_j, t_j = _load(student, s_c, j, seen, wide), _load(teacher, t_c, j, seen, wide)
        there = (s_j > float("-inf")) | (t_j > float("-inf"))
        present += there.to(tl.int32)
        spoilt |= ((s_j < float("inf")) & (t_j < float("inf"))).to(tl.int32) ^ 1
        d_s = s_i[:, None] - s_j[None, :]
        d_t = t_i[:, None] - t_j[None, :]
        fixed = d_s != d_s  # -inf - -inf: the student excludes both, so they are tied and have no gradient
        d_s = tl.where(fixed, 0.0, d_s)
        d_t = tl.where(d_t != d_t, 0.0, d_t)
        cost, gain = _pair(d_s, d_t, k, form)
        cost = tl.where(there[None, :] & (i[:, None] != j[None, :]), cost, 0.0)
        costs += tl.sum(cost, 1).to(tl.float64)
        gains += tl.sum(tl.where(fixed, 0.0, gain), 1).to(tl.float64)

    there = (s_i > float("-inf")) | (t_i > float("-inf"))
    count = tl.sum(present, 0).to(tl.float64)
    scale = w / tl.maximum(count * (count - 1.0), 1.0)
    scale = tl.where(tl.sum(spoilt, 0) > 0, float("nan"), scale)
    tl.store(parts + program, tl.sum(tl.where(there, costs, 0.0), 0) * scale)
    if gradient is not None:
        slope = gains * scale * (-2.0 if form == 3 else -8.0) * steepness
        places = gradient + (n * g_n + m * g_m) + i.to(tl.int64) * g_c
        tl.store(places, narrowed(slope, places), mask=i < classes)


def rkkd(
    student: Tensor,
    teacher: Tensor,
    weight: Tensor | None,
    form: int,
    steepness: float,
    needs_gradient: bool,
) -> tuple[Tensor, Tensor]:
    check_rows(student, teacher, weight=weight)
    if form not in range(4) or not steepness > 0:
        raise RuntimeError(f"expected `form` from 0 to 3 and `steepness` above 0, got {form} and {steepness}")
    values, gradient = empty_results(student, teacher, needs_gradient)
    if values.numel() == 0:
        return values, gradient
    asked = gradient if needs_gradient else None
    width = min(WIDTH, triton.next_power_of_2(student.shape[1]))
    height = min(width, PAIRS // width)
    tiles = triton.cdiv(student.shape[1], height)
    parts = values.new_empty((*values.shape, tiles))
    with launch.on_device(student):
        _kernel[(parts.numel(),)](
            *(student, teacher, weight, parts, asked, student.shape[1]),
            student.shape[2] if student.ndim == 3 else 1,
            *strides(student),
            *strides(teacher),
            *strides(asked),
            struct.unpack("q", struct.pack("d", steepness))[
                0
            ],  # a float argument would be rounded to float32
            form=form,
            height=height,
            width=width,
            num_warps=1,
            wide=wide_type(student, teacher),
        )
    return parts.sum(-1, dtype=torch.float64).to(values.dtype), gradient
