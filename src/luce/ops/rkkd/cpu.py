"""RKKD as one operator; csrc/kernels/rkkd.cpp and, for CUDA, gpu.py hold the mathematics."""

from __future__ import annotations

import torch
from torch import Tensor

from .._rows import wide_dtype
from ..engines import LIBRARY, run_by_triton
from ..fused import fused, register_gradient
from .plain import rkkd_rows

NATIVE_FORMS = ("tanh", "sign_tanh", "product", "clip")  # numbered as in csrc/rkkd.h

LIBRARY.define(
    "rkkd(Tensor student, Tensor teacher, Tensor? weight, int form, float steepness, bool needs_gradient) "
    "-> (Tensor values, Tensor gradient)"
)
run_by_triton("rkkd", "luce.ops.rkkd.gpu")


def rkkd(student: Tensor, teacher: Tensor, weight: Tensor | None, form: str, steepness: float) -> Tensor:
    """Values of the rows."""
    if form == "sigmoid":  # 2 sigmoid(x) - 1 is tanh(x / 2)
        form, steepness = "tanh", steepness / 2
    (values,) = fused("rkkd", student, teacher, weight, NATIVE_FORMS.index(form), steepness)
    return values


@torch.library.register_fake("luce::rkkd")  # type: ignore[untyped-decorator]
def _fake(
    student: Tensor,
    teacher: Tensor,
    weight: Tensor | None,
    form: int,
    steepness: float,
    needs_gradient: bool,
) -> tuple[Tensor, Tensor]:
    wide = wide_dtype(student, teacher)
    values = student.new_empty(student.shape[:1] + student.shape[2:], dtype=wide)
    return values, torch.empty_like(student) if needs_gradient else student.new_empty(0, dtype=wide)


def _again(
    student: Tensor,
    teacher: Tensor,
    weight: Tensor | None,
    form: int,
    steepness: float,
    needs_gradient: bool,
) -> Tensor:
    return rkkd_rows(student, teacher, weight, NATIVE_FORMS[form], steepness)


register_gradient("rkkd", _again)
