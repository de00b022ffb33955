r"""RKKD's differentiable Kendall tau in plain PyTorch: the oracle, the baseline and the fallback.

Symbols are those of the paper (arXiv 2409.17823): ``s`` and ``t`` are the logits of student and teacher,
:math:`D_{ij}` is a difference of two of them, and *k* is the steepness.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from .._pairs import sum_over_pairs
from .._rows import weighted_rows

Form = Literal["tanh", "sign_tanh", "product", "clip", "sigmoid"]
FORMS: tuple[Form, ...] = ("tanh", "sign_tanh", "product", "clip", "sigmoid")
"""The first four are numbered as in csrc/rkkd.h; kernels take ``"sigmoid"`` as ``"tanh"``."""


def agreement(d_s: Tensor, d_t: Tensor, form: str, k: float) -> Tensor:
    """Return how far two differences agree in sign, smoothly from -1 to 1; 0 if either of them is 0.

    No finite step changes the sign of an infinite difference: its gradient is 0.
    """
    if form == "tanh":
        return (k * d_t).tanh() * (k * d_s).tanh()
    if form == "sign_tanh":
        return d_t.sign() * (k * d_s).tanh()
    if form == "product":
        # The infinite factors apart: 0 * inf is NaN, also in the gradient.
        infinite = d_t.isinf() | d_s.isinf()
        product = d_t.masked_fill(infinite, 0) * d_s.masked_fill(infinite, 0)
        return torch.where(infinite, d_t.sign() * d_s.sign(), (k * product).tanh())
    if form == "sigmoid":
        return (2 * (k * d_t).sigmoid() - 1) * (2 * (k * d_s).sigmoid() - 1)
    if form == "clip":
        return d_t.sign() * (k * d_s).clamp(-1, 1)
    raise ValueError(f"expected `form` to be one of {', '.join(map(repr, FORMS))}, got {form!r}")


def differences(x: Tensor, first: int, count: int) -> Tensor:
    """Return ``x_i - x_j`` for all classes i and `count` classes j from the first, ``(N, C, count)``.

    Infinite where one of the two is at ``-inf``, 0 where both are, and without a gradient in either case.
    """
    low = x == -torch.inf
    x = x.masked_fill(low, 0)
    low_i, low_j = low[:, :, None], low[:, None, first : first + count]
    d = x[:, :, None] - x[:, None, first : first + count]
    return d.masked_fill(low_i, -torch.inf).masked_fill(low_j, torch.inf).masked_fill(low_i & low_j, 0)


def exists(s: Tensor, t: Tensor) -> Tensor:
    """Return False for classes that both networks exclude."""
    return ~((s == -torch.inf) & (t == -torch.inf))


def pairs_exist(s: Tensor, t: Tensor, first: int, count: int) -> Tensor:
    """Return False for pairs with a class that both networks exclude, in the layout of `differences`."""
    counts = exists(s, t)
    return counts[:, :, None] & counts[:, None, first : first + count]


def total_agreement(s: Tensor, t: Tensor, form: str, k: float, first: int, count: int) -> Tensor:
    """Sum the agreement of all ordered pairs whose second class is one of `count`; ``(N, C)`` to ``(N,)``."""
    a = agreement(differences(s, first, count), differences(t, first, count), form, k)
    return torch.where(pairs_exist(s, t, first, count), a, 0).sum((1, 2))


def one_minus_tau(total: Tensor, s: Tensor, t: Tensor) -> Tensor:
    """Turn the total agreement of all ordered pairs into the loss; 0 for a row of fewer than two classes."""
    classes = exists(s, t).sum(-1)
    values = torch.where(classes < 2, total, 1 - total / (classes * (classes - 1)).clamp(min=1))
    return nan_if_undefined(values, s, t)


def nan_if_undefined(values: Tensor, s: Tensor, t: Tensor) -> Tensor:
    """Return the values, NaN where a row contains NaN: sign and clip compare, and would hide it."""
    undefined = torch.stack([s, t]).isnan().any(-1).any(0)
    return values * torch.where(undefined, torch.nan, 1.0)


def rkkd(student: Tensor, teacher: Tensor, form: str, steepness: float) -> Tensor:
    """Return ``1 - tau`` of each row, from one array of all pairs.

    Args:
        student: ``(N, C)``, float32 or float64; ``-inf`` excludes a class, NaN or ``+inf`` give NaN.
        teacher: Same shape and dtype.
        form: One of `FORMS`.
        steepness: *k*, per logit (``"product"``: per squared logit).
    Returns:
        ``(N,)``, from 0 to 2.
    """
    s, t = widened(student), widened(teacher)
    total = total_agreement(s, t, form, steepness, 0, s.shape[-1])
    return one_minus_tau(total, s, t).to(student.dtype)


def widened(x: Tensor) -> Tensor:
    """Convert to float64 where the device has it: float32's ``1 - tanh^2`` in autograd loses small slopes."""
    x = x if x.device.type == "mps" else x.double()
    return x.masked_fill(x == torch.inf, torch.nan)


def rkkd_rows(
    student: Tensor,
    teacher: Tensor,
    weight: Tensor | None,
    form: int,
    steepness: float,
    block: int | None = None,
) -> Tensor:
    """`rkkd` of blocks with weights.

    Args:
        student: ``(N, C)`` or ``(N, C, M)``.
        teacher: Same shape.
        weight: ``(N,)`` or ``(N, M)``, or None.
        form: Index into `FORMS`.
        steepness: Above 0.
        block: As the width of `rkkd_in_blocks`.
    """

    def formula(s: Tensor, t: Tensor) -> Tensor:
        return rkkd_in_blocks(s, t, FORMS[form], steepness, block)

    return weighted_rows(formula, student, teacher, weight)


def rkkd_in_blocks(
    student: Tensor, teacher: Tensor, form: str, steepness: float, width: int | None
) -> Tensor:
    """`rkkd` with memory for ``(N, C, width)``; None chooses the width by memory."""
    s, t = widened(student), widened(teacher)

    def part(s: Tensor, t: Tensor, first: int, count: int) -> Tensor:
        return total_agreement(s, t, form, steepness, first, count)

    return one_minus_tau(sum_over_pairs(part, s, t, width), s, t).to(student.dtype)
