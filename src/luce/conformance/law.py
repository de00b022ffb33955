"""What a law of distillation losses is, and how it looks at a loss.

A law is a function ``law(subject, draw)`` that draws an example and raises `Broken` if the loss fails on it.
Its docstring is the statement that users read. Most laws bind any loss; those marked ``claimed`` bind only a
loss that says so, because a sound one may be built otherwise.
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
    """The loss fails on the example: what came out, and what should have."""


class NotApplicable(Exception):
    """The law says nothing about this loss, and why."""


@dataclass(frozen=True)
class Subject:
    """A loss as the laws see it: a value and a gradient, and how exact they can be.

    Attributes:
        dtype: Of the logits it is given: float64, or float32 for a loss that takes no float64.
        exactness: Relative error that rounding may cause: 1e-9 if it computes in float64, 1e-4 in float32.
        against: Another implementation of the same loss.
    """

    loss: Loss
    dtype: torch.dtype
    exactness: float
    against: Subject | None = None

    def with_options(self, **options: Any) -> Subject:
        return replace(self, loss=self.loss.with_options(**options))

    def returned(self, batch: Batch) -> Tensor | Mapping[str, Tensor]:
        try:
            return self.loss(batch.student, batch.teacher, batch.target)
        except Exception as error:
            raise Broken(f"the loss raised {_one_line(error)}") from error

    def total(self, batch: Batch) -> Tensor:
        returned = self.returned(batch)
        value = returned["loss"] if isinstance(returned, Mapping) else returned
        if not isinstance(value, Tensor) or value.ndim:
            raise Broken(f"expected a scalar tensor, got {_describe(value)}")
        return value

    def value(self, batch: Batch) -> float:
        return self.total(batch).item()

    def both(self, batch: Batch) -> tuple[float, Tensor]:
        """The value, and its gradient towards the student's logits."""
        leaf = batch.student.detach().requires_grad_()
        value = self.total(Batch(leaf, batch.teacher, batch.target))
        return value.item(), gradient_of(value, leaf)

    def gradient(self, batch: Batch) -> Tensor:
        return self.both(batch)[1]


def gradient_of(value: Tensor, leaf: Tensor) -> Tensor:
    """Zeros if the value does not depend on the leaf."""
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


def same(what: str, got: float, expected: float, tolerance: float, floor: float | None = None) -> None:
    """Equal up to a relative error, or an absolute one of `floor`: `tolerance` unless given."""
    error = abs(got - expected)
    if not error <= tolerance * abs(expected) + (tolerance if floor is None else floor):
        raise Broken(f"{what}: {got:.6g} instead of {expected:.6g}")


def same_gradient(what: str, got: Tensor, expected: Tensor, tolerance: float) -> None:
    """Equal up to a relative error in the norm; the evidence names the worst entry."""
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
    """A law with its name, its statement, and who reported what it catches.

    Attributes:
        claimed: Whether it binds only a loss that claims it.
        labels: Whether it needs a loss that is given labels.
        teacher: Whether it needs one that is given the teacher's logits.
        infinity: Whether it needs one that may be given logits of -inf.
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
        """Why it says nothing about this loss."""
        if self.labels and not loss.adapter.takes_target:
            return "the loss is given no labels"
        if self.teacher and not loss.adapter.takes_teacher:
            return "the loss is given no teacher"
        if self.infinity and not loss.adapter.takes_infinity:
            return "the loss is given a product that cannot hold -inf"
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
    def declare(check: Callable[[Subject, Draw], None]) -> Callable[[Subject, Draw], None]:
        statement = " ".join((check.__doc__ or "").split())
        LAWS[check.__name__] = Law(
            check.__name__, statement, check, reports, claimed, labels, teacher, infinity
        )
        return check

    return declare
