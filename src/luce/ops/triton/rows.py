"""Read and write rows of logits in a kernel, whatever their dtype and strides."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rows_of(outer, inner, height: tl.constexpr):
    """Return this program's rows: their numbers, their n and m, and which of them exist."""
    program = tl.program_id(0).to(tl.int64)
    if inner is None:
        n = program * height + tl.arange(0, height)
        m = 0
        row = n
        exists = n < outer
    else:
        blocks = tl.cdiv(inner, height)
        n = program // blocks
        m = (program % blocks) * height + tl.arange(0, height)
        row = n * inner + m
        exists = m < inner
    return row, n, m, exists


@triton.jit
def weights_of(weight, row, exists):
    """Return the weights of the rows in float64; 0 where there is no row."""
    if weight is None:
        w = tl.where(exists, 1.0, 0.0).to(tl.float64)
    else:
        w = tl.load(weight + row, mask=exists, other=0.0).to(tl.float64)
    return w


@triton.jit
def starts_of(logits, n, m, outer_stride, inner_stride):
    """Return pointers to the first class of each row."""
    return (logits + n * outer_stride) + m * inner_stride


@triton.jit
def load_possible(starts, class_stride, column, classes, look, wide: tl.constexpr):
    """Load logits ``(height, width)``; -inf past the last class and in rows that are skipped."""
    places = starts[:, None] + (column.to(tl.int64) * class_stride)[None, :]
    x = tl.load(places, mask=look[:, None] & (column < classes)[None, :], other=float("-inf"))
    if x.dtype.primitive_bitwidth == 16:
        x = x.to(tl.float32)
    return x.to(wide)


@triton.jit
def load_logits(starts, class_stride, column, classes, look, wide: tl.constexpr):
    """Load logits as `load_possible` does, in a form whose maximum a loop can carry.

    Triton 3.7 fails to compile a loop of ``top = tl.maximum(top, tl.max(x, 1))`` if x comes straight from
    memory and `top` is used twice after the loop. The `tl.where` avoids this.
    """
    x = load_possible(starts, class_stride, column, classes, look, wide)
    return tl.where((column < classes)[None, :], x, float("-inf"))


@triton.jit
def load_label(starts, class_stride, label, look):
    """Load the label's logits in float64; 0 in rows that are skipped."""
    x = tl.load(starts + label * class_stride, mask=look, other=0.0)
    if x.dtype.primitive_bitwidth == 16:
        x = x.to(tl.float32)
    return x.to(tl.float64)


@triton.jit
def store_classes(starts, class_stride, column, classes, exists, x):
    """Store one number for each class and row that exists."""
    places = starts[:, None] + (column.to(tl.int64) * class_stride)[None, :]
    tl.store(places, narrowed(x, starts), mask=exists[:, None] & (column < classes)[None, :])


@triton.jit
def narrowed(x, pointers):
    """Round x to the dtype that the pointers refer to."""
    if pointers.dtype.element_ty.primitive_bitwidth == 16:
        x = x.to(tl.float32)
    return x.to(pointers.dtype.element_ty)
