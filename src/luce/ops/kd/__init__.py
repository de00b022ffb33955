"""Divergences between the teacher's and the student's distribution, one value per row.

All functions take logits ``(N, C)`` or ``(N, C, M)`` of any strides, float16, bfloat16, float32 or float64,
the teacher's in the shape of the student's. They return ``(N,)`` or ``(N, M)`` in nats, float32 or, if either
network is, float64. Only the reference passes a gradient on to the teacher. `weight`, of the result's dtype
and shape, multiplies each row's value; rows of weight 0 are skipped, whatever they contain. `backend` is
``"auto"``, ``"cpu"``, ``"gpu"`` or ``"reference"``.
"""

from __future__ import annotations

import math

from torch import Tensor

from ..engines import choose
from ..fused import declare, fused
from .reference import KINDS, Kind, divergence_rows

__all__ = ["forward_kl", "jsd", "kl_limit", "reverse_kl"]

declare("divergence", divergence_rows, triton="luce.ops.kd.triton")


def _run(
    kind: Kind,
    student: Tensor,
    teacher: Tensor,
    weight: Tensor | None,
    backend: str,
    temperature: float,
    beta: float = 0.5,
) -> Tensor:
    weight = None if weight is None else weight.contiguous()
    arguments = teacher, weight, KINDS.index(kind), temperature, beta
    if choose(backend, student, teacher, no_kernel=None) == "reference":
        return divergence_rows(student, *arguments)
    return fused("divergence", student, *arguments)[0]


def forward_kl(
    student: Tensor,
    teacher: Tensor,
    temperature: float,
    *,
    weight: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Return KL(teacher || student) at a temperature, without the factor ``temperature**2``.

    Infinite where the student alone excludes a class.

    Example:
        >>> import torch
        >>> forward_kl(torch.tensor([[0.5, -1.0, 2.0, 0.3]]), torch.tensor([[2.0, 1.0, 0.1, -1.0]]), 4.0)
        tensor([0.0888])
    """
    return _run("forward_kl", student, teacher, weight, backend, temperature)


def reverse_kl(
    student: Tensor,
    teacher: Tensor,
    temperature: float,
    *,
    weight: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Return KL(student || teacher) at a temperature, without the factor ``temperature**2``.

    Infinite where the teacher alone excludes a class.

    Example:
        >>> import torch
        >>> reverse_kl(torch.tensor([[0.5, -1.0, 2.0, 0.3]]), torch.tensor([[2.0, 1.0, 0.1, -1.0]]), 4.0)
        tensor([0.0898])
    """
    return _run("reverse_kl", student, teacher, weight, backend, temperature)


def jsd(
    student: Tensor,
    teacher: Tensor,
    beta: float,
    temperature: float,
    *,
    weight: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Return the generalized Jensen-Shannon divergence of a mixture with a share `beta` of the teacher.

    Example:
        >>> import torch
        >>> jsd(torch.tensor([[50.0, 0.0]]), torch.tensor([[0.0, 50.0]]), 0.5, 1.0)  # log 2
        tensor([0.6931])
    """
    return _run("jsd", student, teacher, weight, backend, temperature, beta)


def kl_limit(
    student: Tensor, teacher: Tensor, *, weight: Tensor | None = None, backend: str = "auto"
) -> Tensor:
    """Return the limit of ``temperature**2`` times either KL as the temperature grows.

    It is half the variance, over the classes, of the difference of the logits. For the generalized
    Jensen-Shannon divergence the limit is ``beta * (1 - beta)`` times that. Infinite where one network alone
    excludes a class.

    Example:
        >>> import torch
        >>> student, teacher = torch.tensor([[0.5, -1.0, 2.0, 0.3]]), torch.tensor([[2.0, 1.0, 0.1, -1.0]])
        >>> kl_limit(student, teacher)
        tensor([1.4409])
        >>> 1e6**2 * forward_kl(student, teacher, 1e6)
        tensor([1.4409])
    """
    return _run("limit", student, teacher, weight, backend, math.inf)
