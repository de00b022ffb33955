"""Sums over all pairs of classes with memory for a block of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

PAIRS = 2**21
"""How many pairs of classes are looked at together, in all rows."""


def sum_over_pairs(
    part: Callable[[Tensor, Tensor, int, int], Tensor], s: Tensor, t: Tensor, width: int | None = None
) -> Tensor:
    """Add up what the parts say, with memory for ``(N, C, width)``: going back, each is computed again.

    Args:
        part: ``part(s, t, first, count)`` compares all classes with `count` of them, from the first on.
        s: ``(N, C)``, C > 0.
        t: Same shape.
        width: How many classes are compared with all others at a time; None for as many as `PAIRS` allows.
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
    """The same, but that nothing is kept from one part to the next.

    What `checkpoint` keeps of each part is small, and lies where the part's large arrays were: the C library
    then finds no room for those of the next part, and the process grows as if it held all pairs.
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
        again = torch.is_grad_enabled()  # somebody wants to differentiate the gradient too
        inputs = ctx.saved_tensors if again else [x.detach() for x in ctx.saved_tensors]
        asked = [x for x, wanted in zip(inputs, ctx.needs_input_grad[1:3], strict=True) if wanted]
        gradients = [torch.zeros_like(x) for x in asked]
        for first in range(0, inputs[0].shape[-1], ctx.width):
            with torch.enable_grad():
                for x in asked:
                    x.requires_grad_()
                value = ctx.part(*inputs, first, min(ctx.width, inputs[0].shape[-1] - first))
            of_part = torch.autograd.grad(value, asked, slope, create_graph=again)
            gradients = [
                total + part if again else total.add_(part)
                for total, part in zip(gradients, of_part, strict=True)
            ]
        found = iter(gradients)
        return None, *(next(found) if wanted else None for wanted in ctx.needs_input_grad[1:3]), None
