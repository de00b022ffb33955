"""Module of the DIST loss."""

from __future__ import annotations

from dataclasses import dataclass

from ..functional import relation
from .base import LogitLoss

__all__ = ["DISTLoss"]


@dataclass(eq=False, repr=False, kw_only=True)
class DISTLoss(LogitLoss):
    """Module of `luce.dist_loss`: correlations within rows and across them."""

    function = staticmethod(relation.dist_loss)

    beta: float = 2.0
    gamma: float = 2.0
    temperature: float = 4.0
    scale_by_temperature: bool = True
