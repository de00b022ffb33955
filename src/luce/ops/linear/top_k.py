"""A teacher that said little: the classes that it kept, and all others as one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .logits import TopKLogits


class _Few(torch.autograd.Function):
    """Logits of some classes and, last, of all others as one class, ``(n, K + 1)``.

    That one weighs, at the temperature, what they weigh together. They alone are summed: of a total less the
    kept no digits might be left. A class may be named twice.
    """

    @staticmethod
    def forward(student: Tensor, ids: Tensor, temperature: float) -> Tensor:
        outside = student.scatter(-1, ids, -torch.inf)
        rest = outside.div_(temperature).logsumexp(-1, keepdim=True) * temperature
        return torch.cat([student.gather(-1, ids), rest], dim=-1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        student, ids, ctx.temperature = inputs
        ctx.save_for_backward(student, ids, output)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        student, ids, output = ctx.saved_tensors
        rest = output[:, -1:]
        rest = rest.masked_fill(rest == -torch.inf, torch.inf)  # nothing outside: no class has a share of it
        share = ((student - rest) / ctx.temperature).exp() * slope[:, -1:]
        return share.scatter(-1, ids, 0).scatter_add(-1, ids, slope[:, :-1]), None, None


def _few(student: Tensor, ids: Tensor, temperature: float) -> Tensor:
    found: Tensor = _Few.apply(student, ids, temperature)
    return found


def _checked(teacher: TopKLogits, classes: int) -> Tensor:
    ids = teacher.ids.long()
    if ids.device.type == "cpu":
        ordered = ids.sort(-1).values
        if ids.numel() and not 0 <= int(ordered.min()) <= int(ordered.max()) < classes:
            raise ValueError(
                f"expected `ids` in [0, {classes}), got {int(ordered.min())} to {int(ordered.max())}"
            )
        if bool((ordered[:, 1:] == ordered[:, :-1]).any()):
            raise ValueError("expected each class at most once in a row of `ids`, got one twice")
    return ids


def few_classes(student: Tensor, teacher: TopKLogits, temperature: float) -> tuple[Tensor, Tensor]:
    """Both networks' logits of the kept classes and, last, of all others as one class; ``(n, K + 1)``."""
    ids = _checked(teacher, student.shape[-1])
    s = _few(student, ids, temperature)
    return s, torch.cat([teacher.logits, (teacher.temperature * teacher.rest)[:, None]], dim=-1)


def few_places(
    student: Tensor, teacher: TopKLogits, target: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A ranking of few places whose last, of all other classes as one, costs nothing.

    Before it stands a place for the label, if that was not kept: it comes first then, with no weight, for the
    teacher did not say which.

    Returns:
        Student's and teacher's logits, the order, all ``(n, K + 2)``, and the labels among them.
    """
    classes = student.shape[-1]
    ids = _checked(teacher, classes)
    labels = torch.full_like(ids[:, 0], -1) if target is None else target
    found = ids == labels[:, None]
    kept, named = found.any(-1), (labels >= 0) & (labels < classes)
    apart = named & ~kept
    slot = torch.where(apart, labels, ids[:, 0])[:, None]
    k = ids.shape[-1]
    empty = (torch.arange(k + 2, device=ids.device) == k) & ~apart[:, None]  # its place where it was kept
    s = _few(student, torch.cat([ids, slot], dim=-1), 1.0).masked_fill(empty, -torch.inf)
    nothing = torch.full_like(teacher.rest, -torch.inf)[:, None]
    t = torch.cat([teacher.logits, nothing, (teacher.temperature * teacher.rest)[:, None]], dim=-1)
    by_class = ids.argsort(-1)
    by_logit = teacher.logits.gather(-1, by_class).argsort(stable=True, dim=-1, descending=True)
    ends = torch.arange(k, k + 2, device=ids.device).expand(len(ids), 2)
    order = torch.cat([by_class.gather(-1, by_logit), ends], dim=-1)
    place = torch.where(kept, found.long().argmax(-1), k)
    # A label that names no class stays one.
    return s, t, order, torch.where(named, place, torch.where(labels == -1, -1, k + 2))
