"""Sums over all pairs of classes with memory for a block of them."""

from __future__ import annotations

from collections.abc import Callable

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
    parts = (
        checkpoint(
            part, s, t, first, min(width, classes - first), use_reentrant=False, preserve_rng_state=False
        )
        for first in range(0, classes, width)
    )
    return sum(parts, start=s.new_zeros(()))
