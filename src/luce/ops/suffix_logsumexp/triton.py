"""Log-sum-exp of every suffix in Triton, with its gradient; csrc/kernels/suffix_logsumexp.cpp explains it.

A program walks over its rows a tile at a time, from the end to the beginning and, for the gradient, back. The
carry between tiles is kept in float64, so that errors do not grow with the number of tiles. One program
processes a row, however long: a few long rows leave most of a device idle.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._rows import wide_dtype
from ..triton.launch import LOGITS, launch, strides, tile, wide_type
from ..triton.math import exp, log
from ..triton.rows import load_logits, rows_of, starts_of, store_classes
from ..triton.scan import add, at, nothing, prefixes, suffixes

LONGEST = 1024
"""The most places that a program processes at a time."""


@triton.jit
def _suffixes(x, x_c, column, classes, exists, last_nan, last_inf, carry, e_carry, wide: tl.constexpr):
    """Load a tile of x and sum the exponentials from each of its places on.

    Args:
        last_nan: ``(height,)``, the last place of a NaN behind the tile, -1 for none.
        last_inf: Likewise of +inf.
        carry: The sum behind the tile, a pair of float64.
    Returns:
        The tile, its sums as mantissas and scales, and `last_nan`, `last_inf` and the carry including it.
    """
    x = load_logits(x, x_c, column, classes, exists, wide)
    last_nan = tl.maximum(last_nan, tl.max(tl.where(x != x, column[None, :], -1), 1))
    last_inf = tl.maximum(last_inf, tl.max(tl.where(x == float("inf"), column[None, :], -1), 1))
    z, e, _, _ = suffixes(x, x < float("inf"))
    total, e_total = add(at(z, 0).to(tl.float64), at(e, 0).to(tl.float64), carry, e_carry)
    z, e = add(z, e, carry.to(wide)[:, None], e_carry.to(wide)[:, None])
    return x, z, e, last_nan, last_inf, total, e_total


@triton.jit
def _nothing_yet(height: tl.constexpr, wide: tl.constexpr):
    carry = tl.zeros([height], wide)
    return carry.to(tl.float64), nothing(carry).to(tl.float64)


@triton.jit
def _forward(
    x, values, outer, classes, inner, x_n, x_c, x_m, v_n, v_c, v_m,
    height: tl.constexpr, width: tl.constexpr, wide: tl.constexpr,
):  # fmt: skip
    _row, n, m, exists = rows_of(outer, inner, height)
    x, values = starts_of(x, n, m, x_n, x_m), starts_of(values, n, m, v_n, v_m)
    last_nan = tl.full([height], -1, tl.int32)
    last_inf = tl.full([height], -1, tl.int32)
    carry, e_carry = _nothing_yet(height, wide)
    tiles = tl.cdiv(classes, width)
    for back in range(0, tiles):
        column = (tiles - 1 - back) * width + tl.arange(0, width)
        _s, z, e, last_nan, last_inf, carry, e_carry = _suffixes(
            x, x_c, column, classes, exists, last_nan, last_inf, carry, e_carry, wide
        )
        phi = tl.where(z > 0.0, e + log(tl.where(z > 0.0, z, 1.0)), float("-inf"))
        phi = tl.where(column[None, :] <= last_inf[:, None], float("inf"), phi)
        phi = tl.where(column[None, :] <= last_nan[:, None], float("nan"), phi)
        store_classes(values, v_c, column, classes, exists, phi)


@triton.jit
def _ratios(upstream, u_c, column, classes, exists, z, last_inf, wide: tl.constexpr):
    """Return the upstream gradient over Z's mantissa; 0 where a suffix is empty or infinite."""
    g = load_logits(upstream, u_c, column, classes, exists, wide)
    counts = (z > 0.0) & (column[None, :] > last_inf[:, None])
    return tl.where(counts, g / tl.where(counts, z, 1.0), 0.0)


@triton.jit
def _slopes(x, ratio, e, last_nan, carry, e_carry, wide: tl.constexpr):
    """Return a tile's gradient from the sums of g/Z up to its places, and the sum including the tile."""
    sums, e_sums, _, _ = prefixes(ratio, e)
    last: tl.constexpr = x.shape[1] - 1
    total, e_total = add(at(sums, last).to(tl.float64), at(e_sums, last).to(tl.float64), carry, e_carry)
    sums, e_sums = add(sums, e_sums, carry.to(wide)[:, None], e_carry.to(wide)[:, None])
    finite = tl.abs(x) < float("inf")
    slope = tl.where(finite, exp(tl.where(finite, x + e_sums, 0.0)) * sums, 0.0)
    slope = tl.where((x == float("inf")) | (last_nan >= 0)[:, None], float("nan"), slope)
    return slope, total, e_total


@triton.jit
def _backward(
    x, upstream, gradient, ratios, scales, outer, classes, inner,
    x_n, x_c, x_m, u_n, u_c, u_m, g_n, g_c, g_m,
    height: tl.constexpr, width: tl.constexpr, wide: tl.constexpr,
):  # fmt: skip
    row, n, m, exists = rows_of(outer, inner, height)
    x, upstream = starts_of(x, n, m, x_n, x_m), starts_of(upstream, n, m, u_n, u_m)
    gradient = starts_of(gradient, n, m, g_n, g_m)
    last_nan = tl.full([height], -1, tl.int32)
    last_inf = tl.full([height], -1, tl.int32)
    carry, e_carry = _nothing_yet(height, wide)
    before, e_before = _nothing_yet(height, wide)
    if ratios is None:  # one tile holds the whole row
        column = tl.arange(0, width)
        s, z, e, last_nan, last_inf, _, _ = _suffixes(
            x, x_c, column, classes, exists, last_nan, last_inf, carry, e_carry, wide
        )
        ratio = _ratios(upstream, u_c, column, classes, exists, z, last_inf, wide)
        slope, _, _ = _slopes(s, ratio, e, last_nan, before, e_before, wide)
        store_classes(gradient, g_c, column, classes, exists, slope)
    else:
        ratios, scales = ratios + row * classes, scales + row * classes
        tiles = tl.cdiv(classes, width)
        for back in range(0, tiles):
            column = (tiles - 1 - back) * width + tl.arange(0, width)
            _s, z, e, last_nan, last_inf, carry, e_carry = _suffixes(
                x, x_c, column, classes, exists, last_nan, last_inf, carry, e_carry, wide
            )
            ratio = _ratios(upstream, u_c, column, classes, exists, z, last_inf, wide)
            store_classes(ratios, 1, column, classes, exists, ratio)
            store_classes(scales, 1, column, classes, exists, e)
        # Other threads read what this one has stored.
        tl.debug_barrier()
        for start in range(0, classes, width):
            column = start + tl.arange(0, width)
            inside = exists[:, None] & (column < classes)[None, :]
            s = load_logits(x, x_c, column, classes, exists, wide)
            ratio = tl.load(ratios[:, None] + column[None, :], mask=inside, other=0.0)
            e = tl.load(scales[:, None] + column[None, :], mask=inside, other=0.0)
            slope, before, e_before = _slopes(s, ratio, e, last_nan, before, e_before, wide)
            store_classes(gradient, g_c, column, classes, exists, slope)


def suffix_logsumexp(x: Tensor) -> Tensor:
    _check("x", x, x)
    values = torch.empty_like(x)
    launch(
        _forward,
        x,
        *(x, values),
        after=[*strides(x), *strides(values)],
        most=LONGEST,
        per_warp=256,
        wide=wide_type(x),
    )
    return values


def suffix_logsumexp_backward(upstream: Tensor, x: Tensor) -> Tensor:
    _check("x", x, x)
    _check("upstream", upstream, x)
    gradient = torch.empty_like(x)
    wide = wide_dtype(x, upstream)
    fits = x.shape[1] <= tile(x, most=LONGEST)[1]
    scratch = [None if fits else x.new_empty(x.numel(), dtype=wide) for _ in range(2)]
    launch(
        _backward,
        x,
        *(x, upstream, gradient, *scratch),
        after=[*strides(x), *strides(upstream), *strides(gradient)],
        most=LONGEST,
        per_warp=256,
        wide=wide_type(x, upstream),
    )
    return gradient


def _check(name: str, rows: Tensor, x: Tensor) -> None:
    if rows.ndim not in (2, 3) or rows.shape != x.shape:
        raise RuntimeError(f"expected `{name}` of shape (N, C) or (N, C, M) and as large as `x`")
    if rows.dtype not in LOGITS:
        raise RuntimeError(f"expected `{name}` of a floating dtype, got {rows.dtype}")
    if rows.device != x.device:
        raise RuntimeError(f"expected `{name}` on {x.device} like `x`, got {rows.device}")
