"""Cross-entropy as one operator; csrc/kernels/cross_entropy.cpp and, for CUDA, gpu.py explain it."""

from __future__ import annotations

import torch
from torch import Tensor

from ..engines import LIBRARY, run_by_triton
from ..fused import empty_results, fused, register_gradient
from .plain import cross_entropy_rows

LIBRARY.define(
    "cross_entropy(Tensor student, Tensor target, Tensor? weight, float label_smoothing, "
    "bool needs_gradient) -> (Tensor values, Tensor gradient)"
)
run_by_triton("cross_entropy", "luce.ops.cross_entropy.gpu")


def cross_entropy(student: Tensor, target: Tensor, weight: Tensor | None, label_smoothing: float) -> Tensor:
    weight = None if weight is None else weight.contiguous()
    (values,) = fused("cross_entropy", student, target.contiguous(), weight, label_smoothing)
    return values


@torch.library.register_fake("luce::cross_entropy")  # type: ignore[untyped-decorator]
def _fake(
    student: Tensor, target: Tensor, weight: Tensor | None, label_smoothing: float, needs_gradient: bool
) -> tuple[Tensor, Tensor]:
    return empty_results(student, None, needs_gradient)


def _again(
    student: Tensor, target: Tensor, weight: Tensor | None, label_smoothing: float, needs_gradient: bool
) -> Tensor:
    return cross_entropy_rows(student, target, weight, label_smoothing)


register_gradient("cross_entropy", _again)
