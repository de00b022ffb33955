"""The operators in plain PyTorch: the reference, on the operators' layout and with weights."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from .._rows import weighted_rows
from . import reference

Kind = Literal["forward_kl", "reverse_kl", "jsd", "limit"]
KINDS: tuple[Kind, ...] = ("forward_kl", "reverse_kl", "jsd", "limit")


def divergence_rows(
    student: Tensor, teacher: Tensor, weight: Tensor | None, kind: Kind, temperature: float, beta: float
) -> Tensor:
    """As the native engine; `beta` matters to ``"jsd"`` alone, and `temperature` not to ``"limit"``."""

    def formula(s: Tensor, t: Tensor) -> Tensor:
        if kind == "limit":
            return reference.kl_limit(s, t)
        if kind == "jsd":
            return reference.jsd(s, t, beta, temperature)
        return (reference.forward_kl if kind == "forward_kl" else reference.reverse_kl)(s, t, temperature)

    return weighted_rows(formula, student, teacher, weight)
