"""Modules of the losses on hidden states; the functions of the same names define the formulas."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import ClassVar

import torch
from torch import Tensor, nn

from ...labels import UNLABELLED
from ...ops.engines import Backend
from ...ops.linear import LinearLogits
from ...ops.linear.stream import Teacher
from .._reduce import Reduction
from ..functional import linear
from ..functional.listwise import PLDPlaces
from .base import changed_options

__all__ = ["LinearKDLoss", "LinearPLDLoss"]


@dataclass(eq=False, repr=False, kw_only=True)
class LinearLoss(nn.Module):
    """A function of `LinearLogits` with its options, which the constructor checks."""

    function: ClassVar[Callable[..., Tensor]]

    ignore_index: int = -100
    reduction: Reduction = "mean"
    chunk_rows: int | None = None
    backend: Backend = "auto"

    def __post_init__(self) -> None:
        super().__init__()
        one = torch.ones(1, 1)  # calling the function once, on the smallest input, checks the options
        self(LinearLogits(one, one), one, torch.zeros(1, dtype=torch.long))

    def options(self) -> dict[str, object]:
        """The options as keyword arguments of the function."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def forward(
        self,
        student: LinearLogits,
        teacher: Teacher,
        target: Tensor | None = None,
        row_weight: Tensor | None = None,
    ) -> Tensor:
        """The loss of a batch; shapes and errors are those of the function."""
        return type(self).function(student, teacher, target, row_weight=row_weight, **self.options())

    def extra_repr(self) -> str:
        return changed_options(self)


@dataclass(eq=False, repr=False, kw_only=True)
class LinearKDLoss(LinearLoss):
    """Module of `luce.linear_kd_loss`: `luce.KDLoss` without materialising the logits.

    Example:
        >>> head = torch.nn.Linear(16, 1000)
        >>> student = LinearLogits(torch.randn(8, 16), head.weight, head.bias)
        >>> LinearKDLoss(temperature=2.0)(student, torch.randn(8, 1000)).backward()
        >>> head.weight.grad.shape
        torch.Size([1000, 16])
    """

    function = staticmethod(linear.linear_kd_loss)

    temperature: float = 1.0
    scale_by_temperature: bool = True


@dataclass(eq=False, repr=False, kw_only=True)
class LinearPLDLoss(LinearLoss, PLDPlaces):
    """Module of `luce.linear_pld_loss`: `luce.PLDLoss` without materialising the logits.

    Example:
        >>> LinearPLDLoss(top_k=128)
        LinearPLDLoss(top_k=128)
    """

    function = staticmethod(linear.linear_pld_loss)

    teacher_temperature: float = 1.0
    unlabelled_index: int = UNLABELLED
