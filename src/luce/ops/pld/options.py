"""Options of PLD, in the form that the engines take."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

Ties = Literal["stable", "average"]

EVERY_PLACE = 2**62
"""`top_k` for a loss without truncation."""


class PldOptions(NamedTuple):
    """Options of PLD; `luce.pld_loss` checks and explains them.

    The fields are arguments of the operator ``luce::pld`` in this order, and of csrc/pld.h.

    Attributes:
        teacher_temperature: Softens the weights, not the student.
        top_k: Number of places that count.
        epsilon: The last places do not count if their teacher probabilities sum to less than this.
        tolerance: How much leaving classes unsorted may change the loss, in nats, and the gradient's L1 norm.
        average_ties: Whether classes of equal logits share their places; else the lower index ranks first.
    """

    teacher_temperature: float = 1.0
    top_k: int = EVERY_PLACE
    epsilon: float = 0.0
    tolerance: float = 0.0
    average_ties: bool = False


def default_tolerance(student: Tensor, teacher: Tensor) -> float:
    """Return a tolerance below the rounding of the logits, or of float32 results."""
    if torch.float64 in (student.dtype, teacher.dtype):
        return 0.0
    return 1e-5 if student.dtype == teacher.dtype == torch.float32 else 1e-3
