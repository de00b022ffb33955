"""A teacher of few classes: those that it kept, and all others as one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .logits import TopKLogits


class _Few(torch.autograd.Function):
    """Logits of given classes and, last, of all others as one class, ``(n, K + 1)``.

    The last logit is the others' log-sum-exp at the temperature. The others alone are summed: the total minus
    the given classes could cancel. A class may occur twice in `ids`.
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
        # Without other classes: exp(student - inf) is 0, where exp(-inf - -inf) would be NaN.
        rest = rest.masked_fill(rest == -torch.inf, torch.inf)
        share = ((student - rest) / ctx.temperature).exp() * slope[:, -1:]
        return share.scatter(-1, ids, 0).scatter_add(-1, ids, slope[:, :-1]), None, None


def _few(student: Tensor, ids: Tensor, temperature: float) -> Tensor:
    logits: Tensor = _Few.apply(student, ids, temperature)
    return logits


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
    """Return both networks' logits of the kept classes and, last, of all others as one; ``(n, K + 1)``."""
    ids = _checked(teacher, student.shape[-1])
    s = _few(student, ids, temperature)
    return s, torch.cat([teacher.logits, (teacher.temperature * teacher.rest)[:, None]], dim=-1)


def few_places(
    student: Tensor, teacher: TopKLogits, target: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return a ranking of few places whose last, of all other classes as one, costs nothing.

    The place before the last is for a label that was not kept. It then comes first, without a weight, as the
    teacher's logit of it is unknown.

    Returns:
        Student's and teacher's logits and the order, each ``(n, K + 2)``, and the labels as positions there.
    """
    classes = student.shape[-1]
    ids = _checked(teacher, classes)
    labels = torch.full_like(ids[:, 0], -1) if target is None else target
    is_label = ids == labels[:, None]
    kept, named = is_label.any(-1), (labels >= 0) & (labels < classes)
    apart = named & ~kept
    slot = torch.where(apart, labels, ids[:, 0])[:, None]
    k = ids.shape[-1]
    empty = (torch.arange(k + 2, device=ids.device) == k) & ~apart[:, None]  # unused if the label was kept
    s = _few(student, torch.cat([ids, slot], dim=-1), 1.0).masked_fill(empty, -torch.inf)
    nothing = torch.full_like(teacher.rest, -torch.inf)[:, None]
    t = torch.cat([teacher.logits, nothing, (teacher.temperature * teacher.rest)[:, None]], dim=-1)
    by_class = ids.argsort(-1)
    by_logit = teacher.logits.gather(-1, by_class).argsort(stable=True, dim=-1, descending=True)
    ends = torch.arange(k, k + 2, device=ids.device).expand(len(ids), 2)
    order = torch.cat([by_class.gather(-1, by_logit), ends], dim=-1)
    place = torch.where(kept, is_label.long().argmax(-1), k)
    # A label that names no class is mapped to one that names no position.
    return s, t, order, torch.where(named, place, torch.where(labels == -1, -1, k + 2))
