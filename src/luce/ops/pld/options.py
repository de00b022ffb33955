"""How a PLD is to be computed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Ties = Literal["stable", "average"]


def default_tolerance(student: Tensor, teacher: Tensor) -> float:
    """What is lost in the rounding of the logits themselves, or of what is computed from them."""
    if torch.float64 in (student.dtype, teacher.dtype):
        return 0.0
    return 1e-5 if student.dtype == teacher.dtype == torch.float32 else 1e-3


@dataclass(frozen=True)
class PldOptions:
    """What `luce.pld_loss` explains to its users; here every value is checked and settled.

    Attributes:
        teacher_temperature: Softens the weights only.
        top_k: Number of places that count; None for all.
        epsilon: Count only as many places as leave less than this of the teacher's probability; None for all.
        tolerance: What leaving classes unsorted may change, in nats and in the gradient's L1 norm.
        ties: ``"stable"`` ranks the lower class index first, ``"average"`` lets equal classes share places.
    """

    teacher_temperature: float = 1.0
    top_k: int | None = None
    epsilon: float | None = None
    tolerance: float = 0.0
    ties: Ties = "stable"
