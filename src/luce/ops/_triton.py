"""What the Triton kernels share: how they are launched, how they read rows, and functions with their digits.

Imported where the first kernel runs, for only there Triton has to be. A program works on a few rows, `height`
of them, and goes through their classes `width` at a time. What belongs to a whole row is kept in float64: it
is one number where the classes are thousands.

Triton's own `exp` and `log` of float32 are the hardware's, fast and short of digits far from 0 and near 1;
so what these here take from it is but a power of 2 between -1/2 and 1/2, and the rest is arithmetic.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._rows import wide_dtype
from .engines import INTERPRETED

TILE = 4096
"""Classes, of all rows together, that a program looks at at a time."""

MOST_CLASSES = 2**31 - TILE
"""Kernels count a row's classes in 32 bits; rows, and places in memory, in 64."""

LOGITS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


# Launching


def check_rows(student: Tensor, teacher: Tensor | None, **per_row: Tensor | None) -> None:
    """Refuse what a kernel would misread, in the native engine's words."""
    for name, logits in (("student", student), ("teacher", teacher)):
        if logits is None:
            continue
        if logits.ndim not in (2, 3):
            raise RuntimeError(
                f"expected `{name}` of shape (N, C) or (N, C, M), got {logits.ndim} dimensions"
            )
        if logits.dtype not in LOGITS:
            raise RuntimeError(f"expected `{name}` of a floating dtype, got {logits.dtype}")
        if logits.shape[1] == 0:
            raise RuntimeError(f"expected at least one class in `{name}`")
        if logits.shape[1] > MOST_CLASSES:
            raise RuntimeError(f"expected at most {MOST_CLASSES} classes in `{name}`, got {logits.shape[1]}")
        if logits.shape != student.shape:
            raise RuntimeError(f"expected `{name}` of the same shape as the student's logits")
        if logits.device != student.device:
            raise RuntimeError(f"expected `{name}` on {student.device} like `student`, got {logits.device}")
    rows = student.shape[:1] + student.shape[2:]
    for name, tensor in per_row.items():
        if tensor is None:
            continue
        dtype = torch.int64 if name == "target" else wide_dtype(student, teacher)
        if tensor.numel() != rows.numel() or not tensor.is_contiguous() or tensor.dtype != dtype:
            raise RuntimeError(
                f"expected `{name}` as one number a row, contiguous and of the right dtype ({dtype})"
            )
        if tensor.device != student.device:
            raise RuntimeError(f"expected `{name}` on {student.device} like `student`, got {tensor.device}")


def strides(block: Tensor) -> tuple[int, int, int]:
    """Of ``(N, C)`` or ``(N, C, M)``, by rows outside, classes, and rows inside."""
    outer, of_class = block.stride(0), block.stride(1)
    return outer, of_class, block.stride(2) if block.ndim == 3 else 0


def split_number(x: float) -> tuple[float, float]:
    """A number as two of float32, which is all that a kernel's arguments hold."""
    high = ctypes.c_float(x).value
    return high, x - high if abs(x) < 1e38 else 0.0


def tile(block: Tensor, whole_rows: bool = False, most: int = 2**20) -> tuple[int, int]:
    """Rows and classes that a program looks at together; in ``(N, C, M)``, rows of the same n."""
    most = min(TILE, most)
    width = triton.next_power_of_2(block.shape[1])
    if whole_rows and width > most // 2:
        return 1, width
    width = min(width, most)
    if block.ndim == 2:
        # Short rows alone would leave threads idle.
        height = min(32, most // width) if whole_rows else min(64, most) // width
        return max(1, height), width
    height = min(32, most // width if whole_rows else most, triton.next_power_of_2(block.shape[2]))
    return height, max(1, min(width, most // height))


def launch(
    kernel: Any,
    student: Tensor,
    *tensors: Tensor | None,
    after: Sequence[Any] = (),
    whole_rows: bool = False,
    most: int = TILE,
    per_warp: int = 512,
    **options: Any,
) -> None:
    """Run a kernel on all rows: on `tensors`, N, C and M (None without it), and what is `after`."""
    if student.numel() == 0:
        return
    height, width = tile(student, whole_rows, most)
    inner = student.shape[2] if student.ndim == 3 else 0
    programs = (
        student.shape[0] * triton.cdiv(inner, height) if inner else triton.cdiv(student.shape[0], height)
    )
    with on_device(student):
        kernel[(programs,)](
            *tensors,
            student.shape[0],
            student.shape[1],
            *((inner,) if inner else (None,)),
            *after,
            height=height,
            width=width,
            num_warps=max(1, min(TILE // per_warp, height * width // per_warp)),
            **options,
        )


def wide_type(student: Tensor, teacher: Tensor | None = None) -> Any:
    return tl.float64 if wide_dtype(student, teacher) == torch.float64 else tl.float32


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    return contextlib.nullcontext() if INTERPRETED else torch.cuda.device(tensor.device)


# Rows


@triton.jit
def rows_of(outer, inner, height: tl.constexpr):
    """This program's rows: their numbers, n and m of them, and which of them there are."""
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
    """What the rows are multiplied by; 0 where there is no row."""
    if weight is None:
        w = tl.where(exists, 1.0, 0.0).to(tl.float64)
    else:
        w = tl.load(weight + row, mask=exists, other=0.0).to(tl.float64)
    return w


@triton.jit
def starts_of(logits, n, m, outer_stride, inner_stride):
    return (logits + n * outer_stride) + m * inner_stride


@triton.jit
def load_possible(starts, class_stride, column, classes, look, wide: tl.constexpr):
    """Logits ``(height, width)``; -inf behind the last class, and in rows not to look at."""
    places = starts[:, None] + (column.to(tl.int64) * class_stride)[None, :]
    x = tl.load(places, mask=look[:, None] & (column < classes)[None, :], other=float("-inf"))
    if x.dtype.primitive_bitwidth == 16:
        x = x.to(tl.float32)
    return x.to(wide)


@triton.jit
def load_logits(starts, class_stride, column, classes, look, wide: tl.constexpr):
    """The same for whoever is after the largest of them.

    Triton 3.7 fails at a loop of ``top = tl.maximum(top, tl.max(x, 1))`` where x comes from memory as it is
    and `top` is needed twice behind it.
    """
    x = load_possible(starts, class_stride, column, classes, look, wide)
    return tl.where((column < classes)[None, :], x, float("-inf"))


@triton.jit
def load_label(starts, class_stride, label, look):
    """The label's logits in float64; some number in rows not to look at."""
    x = tl.load(starts + label * class_stride, mask=look, other=0.0)
    if x.dtype.primitive_bitwidth == 16:
        x = x.to(tl.float32)
    return x.to(tl.float64)


@triton.jit
def store_classes(starts, class_stride, column, classes, exists, x):
    places = starts[:, None] + (column.to(tl.int64) * class_stride)[None, :]
    tl.store(places, narrowed(x, starts), mask=exists[:, None] & (column < classes)[None, :])


@triton.jit
def narrowed(x, pointers):
    """As what the pointers point to."""
    if pointers.dtype.element_ty.primitive_bitwidth == 16:
        x = x.to(tl.float32)
    return x.to(pointers.dtype.element_ty)


# Functions


@triton.jit
def number(high, low):
    """What `split_number` has split, in float64."""
    return tl.full([], high, tl.float64) + tl.full([], low, tl.float64)


@triton.jit
def whole_part(t):
    """t >= -127 as n + f, |f| <= 1/2: n, and 2^n, which is 0 for n = -127."""
    shifted = t + 12582912.0  # 1.5 * 2^23: what is behind the point is rounded away
    scale = (shifted.to(tl.int32, bitcast=True) << 23) + (127 << 23)
    return shifted - 12582912.0, scale.to(tl.float32, bitcast=True)


@triton.jit
def exp(x):
    """To 3 ULP for x <= 88; 0 where it would not be a normal number. Infinity gives NaN."""
    if x.dtype == tl.float64:
        e = tl.exp(x)
    else:
        t = tl.maximum(x * 1.4426950408889634, -127.0, propagate_nan=tl.PropagateNan.ALL)
        n, scale = whole_part(t)
        # The hardware's own power of 2 is exact to 2 ULP where its argument is.
        f = tl.fma(x, 1.925963033500e-8, tl.fma(x, 1.4426950216293335, -n))
        e = tl.exp2(f) * scale
    return e


@triton.jit
def power(x, k):
    """2^(x k), likewise, but that k is taken for what float32 holds of it."""
    if x.dtype == tl.float64:
        e = tl.exp2(x * k)
    else:
        n, scale = whole_part(tl.maximum(x * k, -127.0, propagate_nan=tl.PropagateNan.ALL))
        e = tl.exp2(tl.fma(x, k, -n)) * scale
    return e


@triton.jit
def split(x):
    """x = 2^e (1 + f) with 1 + f between sqrt(1/2) and sqrt(2); x a normal number above 0."""
    if x.dtype == tl.float64:
        bits = x.to(tl.int64, bitcast=True)
        whole = (bits - 0x3FE6A09E667F3BCD) >> 52
        f = (bits - (whole << 52)).to(tl.float64, bitcast=True) - 1.0
    else:
        bits = x.to(tl.int32, bitcast=True)
        whole = (bits - 0x3F3504F3) >> 23
        f = (bits - (whole << 23)).to(tl.float32, bitcast=True) - 1.0
    return whole.to(x.dtype), f


@triton.jit
def log1p_rest(f):
    """log(1 + f) - f for sqrt(1/2) <= 1 + f <= sqrt(2)."""
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
    if e.dtype == tl.float64:
        x = e * 0.6931471805582987 + (e * 1.646594958289708e-12 + rest)
    else:
        x = e * 0.693145751953125 + (e * 1.428606765330187e-06 + rest)
    return x


@triton.jit
def log(x):
    """Of normal numbers above 0."""
    e, f = split(x)
    return times_ln2(e, f + log1p_rest(f))


@triton.jit
def log1p(x):
    """For x >= 0."""
    e, f = split(1.0 + x)
    f = tl.where(x < 0.25, x, f)
    return times_ln2(e, f + log1p_rest(f))


@triton.jit
def row_log1p(x):
    """Of one number a row, in float64."""
    u = 1.0 + x
    same = (u == 1.0) | (u == float("inf"))
    return tl.where(same, tl.where(u == 1.0, x, u), tl.log(u) * (x / tl.where(same, 1.0, u - 1.0)))


@triton.jit
def row_expm1(x):
    u = tl.exp(x)
    same = (u == 1.0) | (u == 0.0)
    return tl.where(same, tl.where(u == 1.0, x, -1.0), (u - 1.0) * (x / tl.log(tl.where(same, 2.0, u))))


@triton.jit
def _add_exactly(a_high, a_low, b_high, b_low):
    total = a_high + b_high
    back = total - a_high
    return total, (a_low + b_low) + ((a_high - (total - back)) + (b_high - back))


@triton.jit
def sum_exactly(x):
    """The sums of the rows of a tile in float64, without what float32 would round away on the way."""
    if x.dtype == tl.float64:
        total = tl.sum(x, 1)
    else:
        high, low = tl.reduce((x, tl.zeros_like(x)), 1, _add_exactly)
        total = high.to(tl.float64) + low.to(tl.float64)
    return total


@triton.jit
def finite_top(top):
    """What may be taken from logits: 0 where they are all -inf."""
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def add_exponentials(top, total, x, softness):
    """The largest of all logits so far, and their sum of exponentials relative to it."""
    new = tl.maximum(top, tl.max(x, 1))
    base = finite_top(new)
    fewer = total * exp((top - base) * softness).to(tl.float64)
    return new, fewer + tl.sum(exp((x - base[:, None]) * softness), 1).to(tl.float64)


# The gradient, once more


@triton.jit(do_not_specialize=["outer"])
def _multiply_rows(
    gradient,
    factor,
    outer,
    classes,
    inner,
    g_n,
    g_c,
    g_m,
    f_n,
    f_m,
    height: tl.constexpr,
    width: tl.constexpr,
):
    _, n, m, exists = rows_of(outer, inner, height)
    factors = tl.load(starts_of(factor, n, m, f_n, f_m), mask=exists, other=1.0)
    if tl.max((factors != 1.0).to(tl.int32), 0) > 0:
        starts = starts_of(gradient, n, m, g_n, g_m)
        for start in range(0, classes, width):
            column = start + tl.arange(0, width)
            x = load_logits(starts, g_c, column, classes, exists, factors.dtype) * factors[:, None]
            store_classes(starts, g_c, column, classes, exists, x)


def multiply_rows(gradient: Tensor, factor: Tensor) -> Tensor:
    """Multiply the rows of a gradient in its place by ``(N,)`` or ``(N, M)`` factors; the gradient."""
    f_n, f_m = factor.stride() if factor.ndim == 2 else (factor.stride(0), 0)
    launch(_multiply_rows, gradient, gradient, factor, after=(*strides(gradient), f_n, f_m))
    return gradient
