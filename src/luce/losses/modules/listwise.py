"""Modules of the list-wise losses; the functions of the same names say what they compute."""

from __future__ import annotations

from dataclasses import dataclass

from ...ops._library import Backend
from ...ops.pld.options import Ties
from .._reduce import UNLABELLED
from ..functional import listwise
from .base import LogitLoss


@dataclass(eq=False, repr=False)
class PLDLoss(LogitLoss):
    """Module of `luce.pld_loss`: Plackett-Luce Distillation. Use it alone, without cross-entropy.

    Example:
        >>> import torch
        >>> student_logits = torch.tensor([[0.5, -1.0, 2.0, 0.3]])
        >>> teacher_logits = torch.tensor([[2.0, 1.0, 0.1, -1.0]])
        >>> PLDLoss()(student_logits, teacher_logits, torch.tensor([2]))
        tensor(0.8530)
    """

    function = staticmethod(listwise.pld_loss)

    teacher_temperature: float = 1.0
    top_k: int | None = None
    epsilon: float | None = None
    tolerance: float | None = None
    ties: Ties = "stable"
    unlabelled_index: int = UNLABELLED
    backend: Backend = "auto"


@dataclass(eq=False, repr=False)
class ListMLELoss(LogitLoss):
    """Module of `luce.listmle_loss`: the likelihood of the teacher's ranking, all places alike."""

    function = staticmethod(listwise.listmle_loss)

    unlabelled_index: int = UNLABELLED


@dataclass(eq=False, repr=False)
class PListMLELoss(LogitLoss):
    """Module of `luce.p_listmle_loss`: the likelihood of the teacher's ranking, first places first."""

    function = staticmethod(listwise.p_listmle_loss)

    normalize: bool = True
    unlabelled_index: int = UNLABELLED


@dataclass(eq=False, repr=False)
class ListNetLoss(LogitLoss):
    """Module of `luce.listnet_loss`: cross-entropy with the teacher's top-one probabilities."""

    function = staticmethod(listwise.listnet_loss)

    temperature: float = 1.0
