"""Random numbers that depend on a seed alone, also under a compiler."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.library.custom_op("luce::seeded_uniform", mutates_args=())
def seeded_uniform(like: Tensor, size: int, seed: int) -> Tensor:
    """Return uniform numbers in [0, 1), ``(C, size)`` for `like` of C columns.

    A larger C begins with the same numbers. They are drawn on the CPU, in float64, whatever the device.
    """
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(like.shape[-1], size, dtype=torch.float64, generator=generator).to(like)


@seeded_uniform.register_fake
def _fake(like: Tensor, size: int, seed: int) -> Tensor:
    return like.new_empty(like.shape[-1], size)
