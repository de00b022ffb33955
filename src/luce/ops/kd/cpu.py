"""The native engine of the divergences; csrc/kernels/divergence.cpp holds the mathematics."""

from __future__ import annotations

import torch
from torch import Tensor

from .._fused import empty_results, fused, register_gradient
from .._library import LIBRARY
from .plain import KINDS, Kind, divergence_rows

LIBRARY.define(
    "divergence(Tensor student, Tensor teacher, Tensor? weight, int kind, float temperature, float beta, "
    "bool needs_gradient) -> (Tensor values, Tensor gradient)"
)


def divergence(
    student: Tensor, teacher: Tensor, weight: Tensor | None, kind: Kind, temperature: float, beta: float
) -> Tensor:
    weight = None if weight is None else weight.contiguous()
    (values,) = fused("divergence", student, teacher, weight, KINDS.index(kind), temperature, beta)
    return values


@torch.library.register_fake("luce::divergence")  # type: ignore[untyped-decorator]
def _fake(
    student: Tensor,
    teacher: Tensor,
    weight: Tensor | None,
    kind: int,
    temperature: float,
    beta: float,
    needs_gradient: bool,
) -> tuple[Tensor, Tensor]:
    return empty_results(student, teacher, needs_gradient)


def _again(
    student: Tensor,
    teacher: Tensor,
    weight: Tensor | None,
    kind: int,
    temperature: float,
    beta: float,
    needs_gradient: bool,
) -> Tensor:
    return divergence_rows(student, teacher, weight, KINDS[kind], temperature, beta)


register_gradient("divergence", _again)
