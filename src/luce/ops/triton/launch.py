"""Check the arguments of a kernel and launch it on all rows."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._rows import wide_dtype
from ..engines import INTERPRETED

TILE = 4096
"""Classes, over all its rows, that a program processes at a time."""

MOST_CLASSES = 2**31 - TILE
"""Kernels count the classes of a row in 32 bits, and rows and memory offsets in 64."""

LOGITS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def check_rows(student: Tensor, teacher: Tensor | None, **per_row: Tensor | None) -> None:
    """Raise the native engine's errors for arguments that a kernel would misread."""
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


def strides(block: Tensor | None) -> tuple[int, int, int]:
    """Return the strides of ``(N, C)`` or ``(N, C, M)`` by N, C and M; zeros for a missing tensor."""
    if block is None:
        return 0, 0, 0
    return block.stride(0), block.stride(1), block.stride(2) if block.ndim == 3 else 0


def split_number(x: float) -> tuple[float, float]:
    """Split a number into two of float32: Triton would round a float argument to one."""
    high = ctypes.c_float(x).value
    # Beyond float32's range `high` is infinite: adding x - high to it would give NaN.
    return high, x - high if abs(x) < 1e38 else 0.0


def tile(block: Tensor, whole_rows: bool = False, most: int = 2**20) -> tuple[int, int]:
    """Return how many rows and classes a program processes at a time; in ``(N, C, M)``, rows of one n."""
    most = min(TILE, most)
    width = triton.next_power_of_2(block.shape[1])
    if whole_rows and width > most // 2:
        return 1, width
    width = min(width, most)
    if block.ndim == 2:
        # A program with one short row would leave most of its threads idle.
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
    """Run a kernel on all rows.

    Its arguments are `tensors`, N, C, M (None for matrices), `after`, ``height``, ``width`` and `options`.

    Args:
        kernel: A function of `triton.jit`.
        student: Logits that set the number of rows and the tile.
        tensors: The kernel's pointers.
        after: Strides and numbers.
        whole_rows: Whether one tile must hold all classes of a row.
        most: Classes of a tile, over its rows.
        per_warp: Classes of a tile for each warp.
        options: The kernel's compile-time arguments.
    """
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
            inner or None,
            *after,
            height=height,
            width=width,
            num_warps=max(1, min(TILE // per_warp, height * width // per_warp)),
            **options,
        )


def wide_type(student: Tensor, teacher: Tensor | None = None) -> Any:
    """Return Triton's name of `wide_dtype`."""
    return tl.float64 if wide_dtype(student, teacher) == torch.float64 else tl.float32


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Make the tensor's device the current one, where Triton launches."""
    return contextlib.nullcontext() if INTERPRETED else torch.cuda.device(tensor.device)
