"""Random numbers that depend on nothing but a seed, also under a compiler."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.library.custom_op("luce::seeded_uniform", mutates_args=())
def seeded_uniform(like: Tensor, size: int, seed: int) -> Tensor:
    """Uniform in [0, 1), ``(C, size)`` for `like` of C columns; a larger C begins with the same numbers."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(like.shape[-1], size, dtype=torch.float64, generator=generator).to(like)


@seeded_uniform.register_fake
def _fake(like: Tensor, size: int, seed: int) -> Tensor:
    return like.new_empty(like.shape[-1], size)
