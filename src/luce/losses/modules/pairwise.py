"""Modules of the pairwise losses; the functions of the same names define the formulas."""

from __future__ import annotations

from dataclasses import dataclass

from ...ops.engines import Backend
from ...ops.rkkd import Form
from ..functional import pairwise
from ..functional.pairwise import Channels
from .base import LogitLoss

__all__ = ["RKKDLoss", "RankingHingeLoss", "RankingLogisticLoss"]


@dataclass(eq=False, repr=False, kw_only=True)
class RKKDLoss(LogitLoss):
    """Module of `luce.rkkd_loss`: a differentiable Kendall tau, to be added to another loss.

    Example:
        >>> import torch
        >>> from luce import KDLoss, WeightedSum
        >>> loss = WeightedSum({"kd": (0.9, KDLoss(temperature=4.0)), "rank": (0.9, RKKDLoss())})
        >>> loss(torch.tensor([[1.2, 0.7, -0.4]]), torch.tensor([[2.0, 0.5, -1.0]]), torch.tensor([0]))
        {'kd': tensor(0.1604), 'rank': tensor(0.2820), 'loss': tensor(0.4424)}
    """

    function = staticmethod(pairwise.rkkd_loss)

    form: Form = "tanh"
    steepness: float = 1.0
    channels: Channels = "all"
    share: float = 0.1
    backend: Backend = "auto"


@dataclass(eq=False, repr=False, kw_only=True)
class RankingHingeLoss(LogitLoss):
    """Module of `luce.ranking_hinge_loss`: a margin between the classes of each pair."""

    function = staticmethod(pairwise.ranking_hinge_loss)

    margin: float = 1.0


@dataclass(eq=False, repr=False, kw_only=True)
class RankingLogisticLoss(LogitLoss):
    """Module of `luce.ranking_logistic_loss`: cross-entropy with the teacher's choice in each pair."""

    function = staticmethod(pairwise.ranking_logistic_loss)

    steepness: float = 1.0
