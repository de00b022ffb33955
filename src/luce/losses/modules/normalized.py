"""Modules of the losses on standardized logits."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from ...labels import UNLABELLED
from ..functional import normalized
from .base import LogitLoss

__all__ = ["NormDKDLoss", "NormKDLoss", "Standardized"]


@dataclass(eq=False, repr=False, kw_only=True)
class NormKDLoss(LogitLoss):
    """Module of `luce.normkd_loss`: KD at a temperature per row, in proportion to its spread.

    Example:
        >>> NormKDLoss(t_norm=1.0)
        NormKDLoss(t_norm=1.0)
    """

    function = staticmethod(normalized.normkd_loss)

    t_norm: float = 2.0
    unbiased: bool = True


@dataclass(eq=False, repr=False, kw_only=True)
class NormDKDLoss(LogitLoss):
    """Module of `luce.normdkd_loss`: decoupled KD at a temperature per row, in proportion to its spread."""

    function = staticmethod(normalized.normdkd_loss)
    uses_unlabelled = False

    alpha: float = 1.0
    beta: float = 8.0
    t_norm: float = 2.0
    unbiased: bool = True
    unlabelled_index: int = UNLABELLED


class Standardized(LogitLoss):
    """Apply a loss to the z-scores of both networks' logits, `luce.losses.standardize`.

    With KD and DKD this is logit standardization. It may help or harm other losses. No standardized loss
    changes the spread of the student's logits: a term on the plain logits, such as cross-entropy, must do so.
    In a recipe, write ``standardize: true`` in the term.

    Args:
        loss: Receives the standardized logits; its options stay the same.
        unbiased: As in `luce.losses.standardize`.
    Raises:
        TypeError: If `loss` is no `luce.losses.LogitLoss`; of a sum, standardize its terms.
    Example:
        >>> import torch
        >>> from luce import KDLoss
        >>> loss = Standardized(KDLoss(temperature=2.0))
        >>> student_logits, teacher_logits = torch.tensor([[0.5, -1.0, 2.0]]), torch.tensor([[2.0, 1.0, 0.1]])
        >>> loss(student_logits, teacher_logits)
        tensor(0.8730)
        >>> loss(9 * student_logits + 5, teacher_logits / 3)
        tensor(0.8730)

    References:
        Sun et al., Logit Standardization in Knowledge Distillation, CVPR 2024, arXiv 2403.01427.
    """

    def __init__(self, loss: LogitLoss, *, unbiased: bool = True) -> None:
        nn.Module.__init__(self)  # and not the dataclass's: the options are those of `loss`
        if not isinstance(loss, LogitLoss):
            raise TypeError(
                f"expected `loss` to be a luce.losses.LogitLoss, got {type(loss).__name__}; "
                f"of a sum, standardize its terms"
            )
        self.loss = loss
        self.unbiased = unbiased
        self.ignore_index, self.class_dim, self.reduction = loss.ignore_index, loss.class_dim, loss.reduction
        self.takes_teacher = loss.takes_teacher  # type: ignore[misc]
        self.uses_unlabelled = loss.uses_unlabelled  # type: ignore[misc]

    @property
    def needs_preparation(self) -> bool:
        return self.loss.needs_preparation

    def prepare(self, teacher_logits: Tensor, target: Tensor) -> dict[str, float]:
        return self.loss.prepare(self._standardize(teacher_logits, 1), target)

    def set_epoch(self, epoch: int) -> None:
        self.loss.set_epoch(epoch)

    def options(self) -> dict[str, object]:
        """The options of the loss."""
        return self.loss.options()

    def _call(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor | None,
        target: Tensor | None,
        row_weight: Tensor | None,
        **override: int,
    ) -> Tensor:
        student_logits = self._standardize(student_logits, self.class_dim)
        if teacher_logits is not None:
            teacher_logits = self._standardize(teacher_logits, self.class_dim)
        value: Tensor = self.loss(student_logits, teacher_logits, target, row_weight)
        return value

    def _standardize(self, logits: Tensor, class_dim: int) -> Tensor:
        return normalized.standardize(logits, class_dim=class_dim, unbiased=self.unbiased)

    def extra_repr(self) -> str:
        return "" if self.unbiased else "unbiased=False"
