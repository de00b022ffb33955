"""A context in which losses pass a gradient to the teacher; outside it they never do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

_WANTED = ContextVar("teacher_gradient", default=False)


@contextmanager
def teacher_gradient() -> Iterator[None]:
    """Let losses on logits pass a gradient to the teacher's logits too, inside this ``with`` block.

    Use it in methods that train the teacher through its effect on the student. ``backend="auto"`` then
    chooses the reference, whose derivatives of any order are correct for both networks; the native kernels
    differentiate the student's logits only. Comparisons of the teacher's logits, such as the order of PLD's
    ranking, do not change with a small step of the logits and contribute no gradient. A loss inside
    `torch.compile` ignores this block.

    Raises:
        RuntimeError: By a loss in this block, with ``backend="cpu"``.
        ValueError: By a loss in this block that autograd cannot differentiate with respect to the teacher.
    Example:
        >>> import luce
        >>> student_logits, teacher_logits = torch.zeros(1, 2), torch.tensor([[1.0, 0.0]], requires_grad=True)
        >>> luce.kd_loss(student_logits, teacher_logits).requires_grad
        False
        >>> with teacher_gradient():
        ...     loss = luce.kd_loss(student_logits, teacher_logits)
        >>> torch.autograd.grad(loss, teacher_logits)
        (tensor([[ 0.1966, -0.1966]]),)
    """
    token = _WANTED.set(True)
    try:
        yield
    finally:
        _WANTED.reset(token)


def is_wanted() -> bool:
    # A context variable would break the compiled graph.
    return not torch.compiler.is_compiling() and _WANTED.get()


def as_teacher(logits: Tensor) -> Tensor:
    """Return the teacher's logits detached, unless `teacher_gradient` is active."""
    return logits if is_wanted() else logits.detach()


def refuse_teacher_gradient(loss: str, reason: str) -> None:
    """Refuse `teacher_gradient` for a loss whose dependence on the teacher autograd would miss.

    Raises:
        ValueError: Inside `teacher_gradient`.
    """
    if is_wanted():
        raise ValueError(
            f"expected a loss that can pass a gradient on to the teacher, got {loss}, {reason}; "
            "take another, such as KDLoss or PLDLoss"
        )
