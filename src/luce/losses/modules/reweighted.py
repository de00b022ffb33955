"""Modules of KD's relatives with other weights of rows or classes, or another distance."""

from __future__ import annotations

from dataclasses import dataclass

from ...labels import UNLABELLED
from ..functional import reweighted
from .base import LogitLoss

__all__ = ["NKDLoss", "TVDLoss", "TfKDLoss", "WSLDLoss"]


@dataclass(eq=False, repr=False, kw_only=True)
class NKDLoss(LogitLoss):
    """Module of `luce.nkd_loss`: normalized KD.

    Example:
        >>> NKDLoss(gamma=3.5, temperature=3.0)
        NKDLoss(gamma=3.5, temperature=3.0)
    """

    function = staticmethod(reweighted.nkd_loss)
    uses_unlabelled = False

    gamma: float = 1.5
    temperature: float = 1.0
    unlabelled_index: int = UNLABELLED


@dataclass(eq=False, repr=False, kw_only=True)
class TVDLoss(LogitLoss):
    """Module of `luce.tvd_loss`: total variation distance."""

    function = staticmethod(reweighted.tvd_loss)

    temperature: float = 1.0


@dataclass(eq=False, repr=False, kw_only=True)
class WSLDLoss(LogitLoss):
    """Module of `luce.wsld_loss`: KD with less weight on rows whose label the student already predicts."""

    function = staticmethod(reweighted.wsld_loss)
    uses_unlabelled = False

    temperature: float = 2.0
    scale_by_temperature: bool = True
    unlabelled_index: int = UNLABELLED


@dataclass(eq=False, repr=False, kw_only=True)
class TfKDLoss(LogitLoss):
    """Module of `luce.tfkd_loss`: KD from a virtual teacher. The teacher's logits may be None."""

    function = staticmethod(reweighted.tfkd_loss)
    takes_teacher = False
    uses_unlabelled = False

    correct_probability: float = 0.99
    temperature: float = 20.0
    scale_by_temperature: bool = True
    unlabelled_index: int = UNLABELLED
