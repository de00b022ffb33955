"""Modules of the divergences; the functions of the same names define the formulas."""

from __future__ import annotations

from dataclasses import dataclass

from ...labels import UNLABELLED
from ...ops.engines import Backend
from ..functional import divergence
from .base import LogitLoss

__all__ = ["CrossEntropyLoss", "DKDLoss", "HardLabelLoss", "JSDLoss", "KDLoss", "ReverseKLLoss"]


@dataclass(eq=False, repr=False, kw_only=True)
class CrossEntropyLoss(LogitLoss):
    """Module of `luce.cross_entropy_loss`. The teacher's logits may be None.

    Example:
        >>> import torch
        >>> CrossEntropyLoss()(torch.tensor([[0.5, -1.0, 2.0, 0.3]]), None, torch.tensor([2]))
        tensor(0.3754)
    """

    function = staticmethod(divergence.cross_entropy_loss)
    takes_teacher = False
    uses_unlabelled = False

    label_smoothing: float = 0.0
    unlabelled_index: int = UNLABELLED
    backend: Backend = "auto"


@dataclass(eq=False, repr=False, kw_only=True)
class HardLabelLoss(LogitLoss):
    """Module of `luce.hard_label_loss`: cross-entropy with the teacher's choice.

    Example:
        >>> import torch
        >>> HardLabelLoss()(torch.tensor([[0.5, -1.0, 2.0, 0.3]]), torch.tensor([[0.0, -1.0, 3.0, 1.0]]))
        tensor(0.3754)
    """

    function = staticmethod(divergence.hard_label_loss)

    backend: Backend = "auto"


@dataclass(eq=False, repr=False, kw_only=True)
class KDLoss(LogitLoss):
    """Module of `luce.kd_loss`: the KL divergence from the teacher's softened distribution.

    Example:
        >>> KDLoss(temperature=4.0)
        KDLoss(temperature=4.0)
    """

    function = staticmethod(divergence.kd_loss)

    temperature: float = 1.0
    scale_by_temperature: bool = True
    backend: Backend = "auto"


@dataclass(eq=False, repr=False, kw_only=True)
class ReverseKLLoss(LogitLoss):
    """Module of `luce.reverse_kl_loss`: the KL divergence from the student to the teacher."""

    function = staticmethod(divergence.reverse_kl_loss)

    temperature: float = 1.0
    scale_by_temperature: bool = True
    backend: Backend = "auto"


@dataclass(eq=False, repr=False, kw_only=True)
class JSDLoss(LogitLoss):
    """Module of `luce.jsd_loss`: the generalized Jensen-Shannon divergence."""

    function = staticmethod(divergence.jsd_loss)

    beta: float = 0.5
    temperature: float = 1.0
    scale_by_temperature: bool = True
    backend: Backend = "auto"


@dataclass(eq=False, repr=False, kw_only=True)
class DKDLoss(LogitLoss):
    """Module of `luce.dkd_loss`: decoupled knowledge distillation."""

    function = staticmethod(divergence.dkd_loss)
    uses_unlabelled = False

    alpha: float = 1.0
    beta: float = 8.0
    temperature: float = 4.0
    scale_by_temperature: bool = True
    unlabelled_index: int = UNLABELLED
    backend: Backend = "auto"
