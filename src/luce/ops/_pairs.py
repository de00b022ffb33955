"""Sum over all pairs of classes with memory for a block of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

PAIRS = 2**21
"""Pairs of classes, over all rows, that are evaluated together."""


def sum_over_pairs(
    part: Callable[[Tensor, Tensor, int, int], Tensor], s: Tensor, t: Tensor, width: int | None = None
) -> Tensor:
    """Sum the parts with memory for ``(N, C, width)``; the backward pass recomputes each part.

    Args:
        part: ``part(s, t, first, count)`` compares all classes with `count` of them, from the first on.
        s: ``(N, C)``, C > 0.
        t: Same shape.
        width: Classes that are compared with all others at a time; None for as many as `PAIRS` allows.
    """
    classes = s.shape[-1]
    width = width or max(1, PAIRS // max(1, s.numel()))
    if width >= classes:
        return part(s, t, 0, classes)
    if not torch.compiler.is_compiling():
        total: Tensor = _Sum.apply(part, s, t, width)
        return total
    parts = (
        checkpoint(
            part, s, t, first, min(width, classes - first), use_reentrant=False, preserve_rng_state=False
        )
        for first in range(0, classes, width)
    )
    return sum(parts, start=s.new_zeros(()))


class _Sum(torch.autograd.Function):
    """The same sum, keeping nothing from one part to the next.

    `checkpoint` keeps a little of each part, in the memory where the part's large arrays were. The C library
    then has no contiguous room for the next part's arrays, and the process grows as if it held all pairs.
    """

    @staticmethod
    def forward(ctx: Any, part: Callable[..., Tensor], s: Tensor, t: Tensor, width: int) -> Tensor:
        ctx.part, ctx.width = part, width
        ctx.save_for_backward(s, t)
        total = part(s, t, 0, width)
        for first in range(width, s.shape[-1], width):
            total += part(s, t, first, min(width, s.shape[-1] - first))
        return total

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        again = torch.is_grad_enabled()  # the gradient will be differentiated
        inputs = ctx.saved_tensors if again else [x.detach() for x in ctx.saved_tensors]
        leaves = [x for x, wanted in zip(inputs, ctx.needs_input_grad[1:3], strict=True) if wanted]
        gradients = [torch.zeros_like(x) for x in leaves]
        for first in range(0, inputs[0].shape[-1], ctx.width):
            with torch.enable_grad():
                for x in leaves:
                    x.requires_grad_()
                value = ctx.part(*inputs, first, min(ctx.width, inputs[0].shape[-1] - first))
            of_part = torch.autograd.grad(value, leaves, slope, create_graph=again)
            gradients = [
                total + part if again else total.add_(part)
                for total, part in zip(gradients, of_part, strict=True)
            ]
        rest = iter(gradients)
        return None, *(next(rest) if wanted else None for wanted in ctx.needs_input_grad[1:3]), None
