"""Module of the logit-matching loss."""

from __future__ import annotations

from dataclasses import dataclass

from ..functional import matching
from .base import LogitLoss

__all__ = ["LogitMatchingLoss"]


@dataclass(eq=False, repr=False, kw_only=True)
class LogitMatchingLoss(LogitLoss):
    """Module of `luce.logit_matching_loss`: mean squared difference of the logits."""

    function = staticmethod(matching.logit_matching_loss)

    center: bool = False
