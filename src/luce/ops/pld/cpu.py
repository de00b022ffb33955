"""PLD as one operator; csrc/kernels/pld.cpp and, for CUDA, gpu.py hold the mathematics."""

from __future__ import annotations

import torch
from torch import Tensor

from .._rows import wide_dtype
from ..engines import LIBRARY, run_by_triton
from ..fused import fused, register_gradient
from .options import PldOptions
from .plain import pld_rows

EVERY_PLACE = 2**62

LIBRARY.define(
    "pld(Tensor student, Tensor teacher, Tensor? target, Tensor? weight, Tensor? order, "
    "float teacher_temperature, int top_k, float epsilon, float tolerance, bool average_ties, "
    "bool needs_gradient) -> (Tensor values, Tensor bound, Tensor gradient)"
)
run_by_triton("pld", "luce.ops.pld.gpu")


def pld(
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None,
    weight: Tensor | None,
    order: Tensor | None,
    options: PldOptions,
) -> tuple[Tensor, Tensor]:
    """Values of the rows and, ``(rows, 2)``, what leaving classes unsorted changed at most."""
    values, bound = fused(
        "pld",
        student,
        teacher,
        None if target is None else target.contiguous(),
        None if weight is None else weight.contiguous(),
        order,
        options.teacher_temperature,
        EVERY_PLACE if options.top_k is None else options.top_k,
        options.epsilon or 0.0,
        options.tolerance,
        options.ties == "average",
    )
    return values, bound


@torch.library.register_fake("luce::pld")  # type: ignore[untyped-decorator]
def _fake(
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None,
    weight: Tensor | None,
    order: Tensor | None,
    teacher_temperature: float,
    top_k: int,
    epsilon: float,
    tolerance: float,
    average_ties: bool,
    needs_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    wide = wide_dtype(student, teacher)
    values = student.new_empty(student.shape[:1] + student.shape[2:], dtype=wide)
    gradient = torch.empty_like(student) if needs_gradient else student.new_empty(0, dtype=wide)
    return values, student.new_empty((values.numel(), 2), dtype=wide), gradient


def _again(
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None,
    weight: Tensor | None,
    order: Tensor | None,
    teacher_temperature: float,
    top_k: int,
    epsilon: float,
    tolerance: float,
    average_ties: bool,
    needs_gradient: bool,
) -> Tensor:
    options = PldOptions(
        teacher_temperature,
        None if top_k == EVERY_PLACE else top_k,
        epsilon or None,
        tolerance,
        "average" if average_ties else "stable",
    )
    return pld_rows(student, teacher, target, weight, order, options)


register_gradient("pld", _again)
