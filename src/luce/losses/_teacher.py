"""Whether a loss passes a gradient on to the teacher: never, but where somebody asks for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

_WANTED = ContextVar("teacher_gradient", default=False)


@contextmanager
def teacher_gradient() -> Iterator[None]:
    """In this ``with`` block losses on logits pass a gradient on to the teacher's logits too.

    For methods that train the teacher through what it does to the student. ``backend="auto"`` then takes the
    reference, whose derivatives of any order are right for both networks: the native kernels know the
    student's alone. What a loss learns of the teacher by comparing, such as the order of PLD's ranking, does
    not change with a small step of the logits and has no part in the gradient. A loss inside
    `torch.compile` does not see this block.

    Raises:
        RuntimeError: By a loss in this block, with ``backend="cpu"``.
        ValueError: By a loss in this block whose derivative autograd does not know.
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
    # The compiler cannot follow a context variable.
    return not torch.compiler.is_compiling() and _WANTED.get()


def as_teacher(logits: Tensor) -> Tensor:
    """The teacher's logits as a loss takes them."""
    return logits if is_wanted() else logits.detach()


def refuse_teacher_gradient(loss: str, reason: str) -> None:
    """For losses that look at the teacher in ways that autograd would take for constant.

    Raises:
        ValueError: Inside `teacher_gradient`.
    """
    if is_wanted():
        raise ValueError(
            f"expected a loss that can pass a gradient on to the teacher, got {loss}, {reason}; "
            "take another, such as KDLoss or PLDLoss"
        )
