"""DKD as one operator; csrc/kernels/dkd.cpp and, for CUDA, gpu.py hold the mathematics."""

from __future__ import annotations

import torch
from torch import Tensor

from ..engines import LIBRARY, run_by_triton
from ..fused import empty_results, fused, register_gradient
from .plain import dkd_rows

LIBRARY.define(
    "dkd(Tensor student, Tensor teacher, Tensor target, Tensor? weight, float temperature, float alpha, "
    "float beta, bool needs_gradient) -> (Tensor values, Tensor gradient)"
)
run_by_triton("dkd", "luce.ops.dkd.gpu")


def dkd(
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    weight: Tensor | None,
    temperature: float,
    alpha: float,
    beta: float,
) -> Tensor:
    weight = None if weight is None else weight.contiguous()
    (values,) = fused("dkd", student, teacher, target.contiguous(), weight, temperature, alpha, beta)
    return values


@torch.library.register_fake("luce::dkd")  # type: ignore[untyped-decorator]
def _fake(
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    weight: Tensor | None,
    temperature: float,
    alpha: float,
    beta: float,
    needs_gradient: bool,
) -> tuple[Tensor, Tensor]:
    return empty_results(student, teacher, needs_gradient)


def _again(
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    weight: Tensor | None,
    temperature: float,
    alpha: float,
    beta: float,
    needs_gradient: bool,
) -> Tensor:
    return dkd_rows(student, teacher, target, weight, temperature, alpha, beta)


register_gradient("dkd", _again)
