"""The backward pass of the fused operators on a GPU: multiply a stored gradient by the upstream one."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .launch import launch, strides
from .rows import load_logits, rows_of, starts_of, store_classes


@triton.jit(do_not_specialize=["outer"])
def _multiply_rows(
    gradient, factor, outer, classes, inner, g_n, g_c, g_m, f_n, f_m,
    height: tl.constexpr, width: tl.constexpr,
):  # fmt: skip
    _, n, m, exists = rows_of(outer, inner, height)
    factors = tl.load(starts_of(factor, n, m, f_n, f_m), mask=exists, other=1.0)
    # The gradient of a sum has factors of 1: such programs end without reading a class.
    if tl.max((factors != 1.0).to(tl.int32), 0) > 0:
        starts = starts_of(gradient, n, m, g_n, g_m)
        for start in range(0, classes, width):
            column = start + tl.arange(0, width)
            x = load_logits(starts, g_c, column, classes, exists, factors.dtype) * factors[:, None]
            store_classes(starts, g_c, column, classes, exists, x)


def multiply_rows(gradient: Tensor, factor: Tensor) -> Tensor:
    """Multiply the rows of a gradient in place by ``(N,)`` or ``(N, M)`` factors; return the gradient."""
    f_n, f_m = factor.stride() if factor.ndim == 2 else (factor.stride(0), 0)
    launch(_multiply_rows, gradient, gradient, factor, after=(*strides(gradient), f_n, f_m))
    return gradient
