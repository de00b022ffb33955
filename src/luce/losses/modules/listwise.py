"""Modules of the list-wise losses; the functions of the same names say what they compute."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from ...labels import UNLABELLED
from ...ops.engines import Backend
from ...ops.pld.options import Ties
from ..functional import listwise
from ..temperature import suggest_temperature
from .base import LogitLoss

__all__ = ["ListMLELoss", "ListNetLoss", "PLDLoss", "PListMLELoss"]


@dataclass(eq=False, repr=False, kw_only=True)
class PLDLoss(LogitLoss):
    """Module of `luce.pld_loss`: Plackett-Luce Distillation. Use it alone, without cross-entropy.

    With ``teacher_temperature="auto"`` the temperature is `luce.suggest_temperature` of the teacher's logits
    on the training rows. `luce distill` and `luce.distill` take care of that; in a loop of your own, call
    `prepare` once before the first batch.

    Example:
        >>> import torch
        >>> student_logits = torch.tensor([[0.5, -1.0, 2.0, 0.3]])
        >>> teacher_logits = torch.tensor([[2.0, 1.0, 0.1, -1.0]])
        >>> PLDLoss()(student_logits, teacher_logits, torch.tensor([2]))
        tensor(0.8530)
    """

    function = staticmethod(listwise.pld_loss)

    teacher_temperature: float | Literal["auto"] = 1.0
    top_k: int | None = None
    epsilon: float | None = None
    tolerance: float | None = None
    ties: Ties = "stable"
    unlabelled_index: int = UNLABELLED
    backend: Backend = "auto"

    def __post_init__(self) -> None:
        self.suggested: float | None = None
        super().__post_init__()

    @property
    def needs_preparation(self) -> bool:
        return self.teacher_temperature == "auto"

    def prepare(self, teacher_logits: Tensor, target: Tensor) -> dict[str, float]:
        if not self.needs_preparation:
            return {}
        self.suggested = suggest_temperature(teacher_logits)
        return {"teacher_temperature": self.suggested}

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.needs_preparation:  # otherwise there is nothing to save, and no file need have it
            destination[prefix + "suggested"] = self.suggested

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
        if self.needs_preparation:
            self.suggested = state_dict.pop(prefix + "suggested", None)
        super()._load_from_state_dict(state_dict, prefix, *others)

    def options(self) -> dict[str, object]:
        found = {"teacher_temperature": self.suggested or 1.0} if self.needs_preparation else {}
        return {**super().options(), **found}

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor | None,
        target: Tensor | None = None,
        row_weight: Tensor | None = None,
    ) -> Tensor:
        if self.needs_preparation and self.suggested is None:
            raise RuntimeError(
                "expected `prepare(teacher_logits, target)` before the first batch: "
                '`teacher_temperature="auto"` is found from the teacher\'s logits on the training rows'
            )
        return super().forward(student_logits, teacher_logits, target, row_weight)


@dataclass(eq=False, repr=False, kw_only=True)
class ListMLELoss(LogitLoss):
    """Module of `luce.listmle_loss`: the likelihood of the teacher's ranking, all places alike."""

    function = staticmethod(listwise.listmle_loss)

    unlabelled_index: int = UNLABELLED


@dataclass(eq=False, repr=False, kw_only=True)
class PListMLELoss(LogitLoss):
    """Module of `luce.p_listmle_loss`: the likelihood of the teacher's ranking, first places first."""

    function = staticmethod(listwise.p_listmle_loss)

    normalize: bool = True
    unlabelled_index: int = UNLABELLED


@dataclass(eq=False, repr=False, kw_only=True)
class ListNetLoss(LogitLoss):
    """Module of `luce.listnet_loss`: cross-entropy with the teacher's top-one probabilities."""

    function = staticmethod(listwise.listnet_loss)

    temperature: float = 1.0
