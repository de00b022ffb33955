"""Laws of distillation losses, and the comparisons that they use.

A law is a function ``law(subject, draw)`` that draws an example and raises `Broken` if the loss fails on it.
Its docstring is the statement shown to users. Most laws bind every loss. A law marked ``claimed`` binds only
a loss that claims it, because a sound loss may violate it by design.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .adapters import Loss
from .draw import Batch, Draw

IGNORED = -100
NOT_CLAIMED = "not claimed"


class Broken(Exception):
    """The loss fails on the example; the message holds actual and expected value."""


class NotApplicable(Exception):
    """The law does not apply to this loss; the message holds the reason."""


@dataclass(frozen=True)
class Subject:
    """A loss under test, with the precision to expect of it.

    Attributes:
        loss: The loss.
        dtype: Dtype of the logits: float64, or float32 for a loss that does not accept float64.
        exactness: Relative error that rounding may cause: 1e-9 if the loss computes in float64, 1e-4 in
            float32.
        against: Another implementation of the same loss.
    """

    loss: Loss
    dtype: torch.dtype
    exactness: float
    against: Subject | None = None

    def with_options(self, **options: Any) -> Subject:
        """The same subject, its loss with further options."""
        return replace(self, loss=self.loss.with_options(**options))

    def returned(self, batch: Batch) -> Tensor | Mapping[str, Tensor]:
        """Call the loss and return its output unchanged.

        Raises:
            Broken: If the loss raises.
        """
        try:
            return self.loss(batch.student, batch.teacher, batch.target)
        except Exception as error:
            raise Broken(f"the loss raised {_one_line(error)}") from error

    def total(self, batch: Batch) -> Tensor:
        """Return the scalar, or the entry ``"loss"`` of a mapping.

        Raises:
            Broken: If the loss raises, or returns anything else.
        """
        returned = self.returned(batch)
        value = returned["loss"] if isinstance(returned, Mapping) else returned
        if not isinstance(value, Tensor) or value.ndim:
            raise Broken(f"expected a scalar tensor, got {_describe(value)}")
        return value

    def value(self, batch: Batch) -> float:
        """The value of the loss."""
        return self.total(batch).item()

    def value_and_gradient(self, batch: Batch) -> tuple[float, Tensor]:
        """The value, and its gradient with respect to the student's logits."""
        leaf = batch.student.detach().requires_grad_()
        value = self.total(Batch(leaf, batch.teacher, batch.target))
        return value.item(), gradient_of(value, leaf)

    def gradient(self, batch: Batch) -> Tensor:
        """The gradient with respect to the student's logits."""
        return self.value_and_gradient(batch)[1]


def gradient_of(value: Tensor, leaf: Tensor) -> Tensor:
    """Gradient of the value with respect to the leaf; zeros if the value does not depend on it."""
    if not value.requires_grad:
        return torch.zeros_like(leaf)
    try:
        (gradient,) = torch.autograd.grad(value, leaf, allow_unused=True, retain_graph=True)
    except Exception as error:
        raise Broken(f"the gradient raised {_one_line(error)}") from error
    return torch.zeros_like(leaf) if gradient is None else gradient


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:160]}"


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    return f"an object of type {type(value).__name__}"


def expect_close(
    what: str, got: float, expected: float, tolerance: float, floor: float | None = None
) -> None:
    """Compare two values, up to a relative error of `tolerance` plus an absolute one of `floor`.

    Args:
        what: Names the value in the evidence.
        got: The value.
        expected: The value to compare with.
        tolerance: Relative error.
        floor: Absolute error; `tolerance` if None.
    Raises:
        Broken: If they differ, or one of them is NaN.
    """
    error = abs(got - expected)
    # `not error <= ...`, as a NaN makes every comparison False.
    if not error <= tolerance * abs(expected) + (tolerance if floor is None else floor):
        raise Broken(f"{what}: {got:.6g} instead of {expected:.6g}")


def expect_close_gradient(what: str, got: Tensor, expected: Tensor, tolerance: float) -> None:
    """Compare two gradients entry by entry; the evidence names the worst entry.

    Args:
        what: Names the gradient in the evidence.
        got: The gradient.
        expected: The gradient to compare with.
        tolerance: Error allowed at each entry, relative to one plus the norm of `expected`.
    Raises:
        Broken: If they differ, or an entry is NaN.
    """
    error = (got.double() - expected.double()).abs()
    allowed = tolerance * (1 + expected.double().norm().item())
    if error.numel() and not (error <= allowed).all():
        place = int(error.nan_to_num(nan=math.inf).argmax())
        row, column = divmod(place, got.shape[-1])
        raise Broken(
            f"{what}, at row {row} and class {column}: {got[row, column].item():.6g} "
            f"instead of {expected[row, column].item():.6g}"
        )


def classes(count: int) -> str:
    return "a class" if count == 1 else f"{count} classes"


@dataclass(frozen=True)
class Law:
    """A law.

    Attributes:
        name: Its name.
        statement: The property that a loss must have, in a sentence.
        check: Draws an example and raises `Broken` if the loss fails on it.
        reports: Public reports of the defect that the law catches.
        claimed: Whether it binds only a loss that claims it.
        labels: Whether it applies only to a loss that receives labels.
        teacher: Whether it applies only to a loss that receives the teacher's logits.
        infinity: Whether it applies only to a loss that can receive logits of -inf.
    """

    name: str
    statement: str
    check: Callable[[Subject, Draw], None]
    reports: tuple[str, ...]
    claimed: bool
    labels: bool
    teacher: bool
    infinity: bool

    def reason_against(self, loss: Loss) -> str | None:
        """Return why the law does not apply to this loss, or None if it does."""
        if self.labels and not loss.adapter.takes_target:
            return "the loss receives no labels"
        if self.teacher and not loss.adapter.takes_teacher:
            return "the loss receives no teacher logits"
        if self.infinity and not loss.adapter.takes_infinity:
            return "the loss receives its logits as a matrix product, which cannot hold -inf"
        if self.claimed and self.name not in loss.claims:
            return NOT_CLAIMED
        return None


LAWS: dict[str, Law] = {}


def law(
    *reports: str,
    claimed: bool = False,
    labels: bool = False,
    teacher: bool = False,
    infinity: bool = False,
) -> Callable[[Callable[[Subject, Draw], None]], Callable[[Subject, Draw], None]]:
    """Register a function as a law; the arguments are attributes of `Law`."""

    def declare(check: Callable[[Subject, Draw], None]) -> Callable[[Subject, Draw], None]:
        statement = " ".join((check.__doc__ or "").split())
        LAWS[check.__name__] = Law(
            check.__name__, statement, check, reports, claimed, labels, teacher, infinity
        )
        return check

    return declare
