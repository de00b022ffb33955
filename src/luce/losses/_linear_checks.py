"""Argument checks of the losses on hidden states."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import check_logits
from ..ops.linear import LinearLogits, TopKLogits


def check_linear(student: LinearLogits, teacher: LinearLogits | TopKLogits | Tensor) -> None:
    """Check that the student is `LinearLogits` and that the teacher has its rows and classes."""
    if not isinstance(student, LinearLogits):
        raise TypeError(f"expected `student` to be LinearLogits, got {type(student).__name__}")
    if not isinstance(teacher, (LinearLogits, TopKLogits, Tensor)):
        raise TypeError(
            f"expected `teacher` to be LinearLogits, TopKLogits or a torch.Tensor of logits, "
            f"got {type(teacher).__name__}"
        )
    for name, logits in (("student", student), ("teacher", teacher)):
        if isinstance(logits, LinearLogits):
            check_head_dtypes(name, logits)
    if isinstance(teacher, TopKLogits):
        rows, device = teacher.ids.shape[:-1], teacher.ids.device
        if teacher.ids.shape[-1] > student.classes:
            raise ValueError(
                f"expected `teacher` with at most the {student.classes} classes of `student`, "
                f"got {teacher.ids.shape[-1]} of each row"
            )
    elif isinstance(teacher, LinearLogits):
        rows, device = teacher.shape[:-1], teacher.hidden.device
    else:
        check_logits("teacher", teacher)
        rows, device = teacher.shape[:-1], teacher.device
    if rows != student.shape[:-1]:
        raise ValueError(
            f"expected `teacher` with rows of shape {tuple(student.shape[:-1])} like `student`, "
            f"got {tuple(rows)}"
        )
    if not isinstance(teacher, TopKLogits) and teacher.shape[-1] != student.classes:
        raise ValueError(
            f"expected `teacher` with the {student.classes} classes of `student`, got {teacher.shape[-1]}; "
            f"`vocab_size` excludes padding classes and selects the first classes that both share"
        )
    if device != student.hidden.device:
        raise ValueError(f"expected `teacher` on {student.hidden.device} like `student`, got {device}")


def check_rest(teacher: LinearLogits | TopKLogits | Tensor, name: str, temperature: float) -> None:
    """Check the temperature against that of `TopKLogits.rest`, which is known at one temperature only."""
    if isinstance(teacher, TopKLogits) and teacher.temperature != temperature:
        raise ValueError(
            f"expected `{name}` to be the {teacher.temperature!r} at which `teacher.rest` was taken, "
            f"got {temperature!r}; take TopKLogits at that temperature"
        )


def check_head_dtypes(name: str, logits: LinearLogits) -> None:
    """Check that head and hidden states share a dtype; autocast converts them itself."""
    hidden = logits.hidden
    if torch.is_autocast_enabled(hidden.device.type):
        return
    for part in ("weight", "bias"):
        tensor = getattr(logits, part)
        if tensor is not None and tensor.dtype != hidden.dtype:
            raise TypeError(
                f"expected `{name}.{part}` of {hidden.dtype} like `{name}.hidden`, got {tensor.dtype}; "
                f"convert one of them, or use torch.autocast"
            )
