"""The divergences as one operator; csrc/kernels/divergence.cpp and, for CUDA, gpu.py hold the mathematics."""

from __future__ import annotations

import torch
from torch import Tensor

from ..engines import LIBRARY, run_by_triton
from ..fused import empty_results, fused, register_gradient
from .plain import KINDS, Kind, divergence_rows

LIBRARY.define(
    "divergence(Tensor student, Tensor teacher, Tensor? weight, int kind, float temperature, float beta, "
    "bool needs_gradient) -> (Tensor values, Tensor gradient)"
)
run_by_triton("divergence", "luce.ops.kd.gpu")


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
