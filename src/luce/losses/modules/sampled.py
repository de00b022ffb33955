"""Module of RankDistil; the function of the same name defines the formula."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..functional import sampled
from .base import LogitLoss

__all__ = ["RankDistilLoss"]


@dataclass(eq=False, repr=False, kw_only=True)
class RankDistilLoss(LogitLoss):
    """Module of `luce.rankdistil_loss`: the likelihood of rankings drawn from the teacher."""

    function = staticmethod(sampled.rankdistil_loss)

    top_k: int | None = None
    sample_size: int = 8
    temperature: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        with torch.random.fork_rng(devices=()):  # the check of the options draws rankings
            super().__post_init__()
