"""Module of multi-level logit distillation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..functional import multilevel
from .base import LogitLoss

__all__ = ["MLLDLoss"]


@dataclass(eq=False, repr=False, kw_only=True)
class MLLDLoss(LogitLoss):
    """Module of `luce.mlld_loss`: KD and Gram matrices of rows and of classes, at several temperatures."""

    function = staticmethod(multilevel.mlld_loss)

    temperatures: Sequence[float] = (2.0, 3.0, 4.0, 5.0, 6.0)
    instance_weight: float = 1.0
    batch_weight: float = 1.0
    class_weight: float = 1.0
