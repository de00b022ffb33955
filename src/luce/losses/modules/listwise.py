"""Modules of the list-wise losses; the functions of the same names define the formulas."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ...labels import UNLABELLED
from ...ops.engines import Backend
from ..functional import listwise
from ..temperature import suggest_temperature
from .base import LogitLoss

__all__ = ["ListMLELoss", "ListNetLoss", "PLDLoss", "PListMLELoss"]


@dataclass(eq=False, repr=False, kw_only=True)
class PLDLoss(LogitLoss, listwise.PLDPlaces):
    """Module of `luce.pld_loss`: Plackett-Luce Distillation. Use it alone, without cross-entropy.

    With ``teacher_temperature="auto"`` the temperature is `luce.suggest_temperature` of the teacher's logits
    on the training rows. `luce distill` and `luce.distill` compute it; in a loop of your own, call `prepare`
    once before the first batch.

    Example:
        >>> import torch
        >>> student_logits = torch.tensor([[0.5, -1.0, 2.0, 0.3]])
        >>> teacher_logits = torch.tensor([[2.0, 1.0, 0.1, -1.0]])
        >>> PLDLoss()(student_logits, teacher_logits, torch.tensor([2]))
        tensor(0.8530)
    """

    function = staticmethod(listwise.pld_loss)
    prepared_buffers = ("suggested_temperature",)

    teacher_temperature: float | Literal["auto"] = 1.0
    unlabelled_index: int = UNLABELLED
    backend: Backend = "auto"

    def __post_init__(self) -> None:
        self._known_temperature: float | None = None
        super().__post_init__()

    @property
    def needs_preparation(self) -> bool:
        return self.teacher_temperature == "auto"

    def prepare(self, teacher_logits: Tensor, target: Tensor) -> dict[str, float]:
        if not self.needs_preparation:
            return {}
        # Of float32, so that a run resumes with the very temperature that it started with.
        suggested = torch.tensor(suggest_temperature(teacher_logits), dtype=torch.float32)
        self._known_temperature = suggested.item()
        self.suggested_temperature = suggested.to(teacher_logits.device)
        return {"teacher_temperature": self._known_temperature}

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *more: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *more)
        # Not in `forward`, which would wait for a GPU and cannot be compiled with data-dependent numbers.
        if self.suggested_temperature is not None:
            self._known_temperature = self.suggested_temperature.item()

    def options(self) -> dict[str, object]:
        suggested = {"teacher_temperature": self._known_temperature or 1.0} if self.needs_preparation else {}
        return {**super().options(), **suggested}

    def _how_to_prepare(self) -> str:
        return (
            "expected `prepare(teacher_logits, target)` to be called before the first batch: "
            '`teacher_temperature="auto"` is computed from the teacher\'s logits on the training rows'
        )


@dataclass(eq=False, repr=False, kw_only=True)
class ListMLELoss(LogitLoss):
    """Module of `luce.listmle_loss`: the likelihood of the ranking, all places with the same weight."""

    function = staticmethod(listwise.listmle_loss)

    unlabelled_index: int = UNLABELLED


@dataclass(eq=False, repr=False, kw_only=True)
class PListMLELoss(LogitLoss):
    """Module of `luce.p_listmle_loss`: the likelihood of the ranking, first places with most weight."""

    function = staticmethod(listwise.p_listmle_loss)

    normalize: bool = True
    unlabelled_index: int = UNLABELLED


@dataclass(eq=False, repr=False, kw_only=True)
class ListNetLoss(LogitLoss):
    """Module of `luce.listnet_loss`: cross-entropy with the teacher's top-one probabilities."""

    function = staticmethod(listwise.listnet_loss)

    temperature: float = 1.0
