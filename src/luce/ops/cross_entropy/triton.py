"""Cross-entropy in Triton; csrc/kernels/cross_entropy.cpp explains the formulas."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..fused import empty_results
from ..triton.launch import check_rows, launch, split_number, strides, wide_type
from ..triton.math import add_exponentials, exp, finite_top, number, row_log1p
from ..triton.rows import load_label, load_possible, rows_of, starts_of, store_classes, weights_of


@triton.jit(do_not_specialize=["outer"])
def _kernel(
    student, target, weight, values, gradient, outer, classes, inner,
    s_n, s_c, s_m, g_n, g_c, g_m, smoothing_high, smoothing_low,
    smooth: tl.constexpr, height: tl.constexpr, width: tl.constexpr, wide: tl.constexpr,
):  # fmt: skip
    row, n, m, exists = rows_of(outer, inner, height)
    w = weights_of(weight, row, exists)
    look = w != 0.0
    student = starts_of(student, n, m, s_n, s_m)
    label = tl.load(target + row, mask=look, other=0)
    named = (label >= 0) & (label < classes)
    smoothing = number(smoothing_high, smoothing_low)

    # The rest is summed without the label: log(1 + rest/label) keeps its digits where the label is almost
    # certain, and -log of its probability would be 0.
    of_label = load_label(student, s_c, label, look & named)
    top = of_label.to(wide)
    z_rest = tl.zeros([height], tl.float64)
    # Of the classes that exist: the sum of their distances below the maximum, and their number. A sum of the
    # logits themselves would lose digits to a common offset.
    below = tl.zeros([height], tl.float64)
    count = tl.zeros([height], tl.float64)
    for start in range(0, classes, width):
        column = start + tl.arange(0, width)
        s = _rest(student, s_c, column, classes, look, label, wide)
        old = finite_top(top)
        top, z_rest = add_exponentials(top, z_rest, s, 1.0)
        if smooth:
            there = s > float("-inf")
            moved = finite_top(top)
            below += count * (old.to(tl.float64) - moved.to(tl.float64))
            below += tl.sum(tl.where(there, s - moved[:, None], 0.0), 1).to(tl.float64)
            count += tl.sum(there.to(tl.int32), 1).to(tl.float64)
    top = finite_top(top)
    x = of_label - top.to(tl.float64)
    e_label = tl.exp(x)
    z = z_rest + e_label
    defined = named & (z == z) & (z > 0.0) & (of_label == of_label)
    near = x > -30.0  # further down e_label may underflow, and log Z - x cancels nothing
    ratio = z_rest / tl.where(near, e_label, 1.0)
    value = tl.where(near, row_log1p(ratio), tl.log(z) - x)
    even = tl.zeros([height], tl.float64)
    has_label = of_label > float("-inf")
    if smooth:
        exist = count + has_label.to(tl.float64)
        evenly = tl.log(z) - (below + tl.where(has_label, x, 0.0)) / exist
        value = (1.0 - smoothing) * value + smoothing * evenly
        even = smoothing / exist
    value = tl.where(defined, value, float("nan"))
    tl.store(values + row, tl.where(look, value * w, 0.0), mask=exists)

    if gradient is not None:
        gradient = starts_of(gradient, n, m, g_n, g_m)
        w = tl.where(defined, w, float("nan"))
        scale = (w / z).to(wide)
        even_wide = (even * w).to(wide)
        at_label = tl.where(has_label, smoothing * e_label / z - even, 0.0) - (1.0 - smoothing) * (z_rest / z)
        at_label = (at_label * w).to(wide)
        tiles = tl.cdiv(classes, width)
        for back in range(0, tiles):  # from the end: the tiles read last may still be in the cache
            column = (tiles - 1 - back) * width + tl.arange(0, width)
            s = _rest(student, s_c, column, classes, look, label, wide)
            slope = exp(s - top[:, None]) * scale[:, None]
            if smooth:
                slope = slope - tl.where(s == float("-inf"), 0.0, even_wide[:, None])
            slope = tl.where(column[None, :] == label[:, None], at_label[:, None], slope)
            slope = tl.where(look[:, None], slope, 0.0)
            store_classes(gradient, g_c, column, classes, exists, slope)


@triton.jit
def _rest(student, s_c, column, classes, look, label, wide: tl.constexpr):
    """Load a tile with the label's logit replaced by -inf."""
    s = load_possible(student, s_c, column, classes, look, wide)
    return tl.where(column[None, :] == label[:, None], float("-inf"), s)


def cross_entropy(
    student: Tensor, target: Tensor, weight: Tensor | None, label_smoothing: float, needs_gradient: bool
) -> tuple[Tensor, Tensor]:
    check_rows(student, None, target=target, weight=weight)
    values, gradient = empty_results(student, None, needs_gradient)
    asked = gradient if needs_gradient else None
    launch(
        _kernel,
        student,
        *(student, target, weight, values, asked),
        after=[*strides(student), *strides(asked), *split_number(label_smoothing)],
        smooth=label_smoothing != 0,
        wide=wide_type(student),
    )
    return values, gradient
