"""A differentiable Kendall tau between the teacher's and the student's logits, one value per row."""

from __future__ import annotations

import math

from torch import Tensor

from .._rows import wide_dtype
from ..engines import choose
from ..fused import declare, fused
from .reference import FORMS, Form, rkkd_rows

__all__ = ["FORMS", "Form", "rkkd"]

declare("rkkd", rkkd_rows, triton="luce.ops.rkkd.triton")


def rkkd(
    student: Tensor,
    teacher: Tensor,
    *,
    form: Form = "tanh",
    steepness: float = 1.0,
    weight: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    r"""Return one minus a smooth Kendall tau between the student's and the teacher's order of the classes.

    .. math:: 1 - \frac{1}{P} \sum_{i < j} a(s_i - s_j, t_i - t_j)

    over all *P* pairs of classes, with an agreement *a* from -1 to 1 that is 0 for a tie:

    =============  ==========================================================
    ``tanh``       :math:`\tanh(k D^t) \tanh(k D^s)`
    ``sign_tanh``  :math:`\mathrm{sgn}(D^t) \tanh(k D^s)`
    ``product``    :math:`\tanh(k D^t D^s)`
    ``sigmoid``    as ``tanh`` with half the steepness
    ``clip``       :math:`\mathrm{sgn}(D^t) \mathrm{clip}(k D^s, -1, 1)`
    =============  ==========================================================

    All pairs are evaluated, with memory for one row at a time. The exception is ``clip`` on the CPU: for rows
    of many classes the native engine sorts and counts, in C log C steps. If ``1 / k`` is below all
    differences, ``clip`` is one minus Kendall's tau itself (tau-a, in which a tie counts 0).

    A class at ``-inf`` in both networks does not exist: its pairs count neither in the sum nor in *P*. A
    class at ``-inf`` in one network ranks infinitely far below the others there, is tied with other excluded
    classes, and gets no gradient. The value of a row with fewer than two classes is 0.

    Args:
        student: ``(N, C)`` or ``(N, C, M)`` of any strides, float16, bfloat16, float32 or float64.
        teacher: Same shape, any of these dtypes; only the reference passes a gradient on to it.
        form: The agreement.
        steepness: *k* above 0, per logit (``"product"``: per squared logit). The larger it is, the closer the
            value is to Kendall's tau and the fewer pairs have a gradient: those within a few *1/k*.
        weight: ``(N,)`` or ``(N, M)``, multiplies each row's value; rows of weight 0 are skipped, whatever
            they contain.
        backend: ``"auto"``, ``"cpu"``, ``"gpu"`` or ``"reference"``.
    Returns:
        ``(N,)`` or ``(N, M)``, from 0 to 2 times the weight, float32 or, if either network is, float64. NaN
        for rows that contain NaN or ``+inf``.
    Raises:
        TypeError: If a network's logits are not of a floating-point dtype.
        ValueError: If shapes differ, there are fewer than two classes, or an option is out of range.
        RuntimeError: If the named backend cannot run here.
    Example:
        >>> import torch
        >>> student, teacher = torch.tensor([[1.2, 0.7, -0.4, 0.9]]), torch.tensor([[2.0, 0.5, -1.0, 0.3]])
        >>> rkkd(student, teacher)
        tensor([0.4940])
        >>> rkkd(student, teacher, steepness=1000.0)  # one pair of six is in the wrong order
        tensor([0.3333])

    References:
        Guan et al., Enhancing Logits Distillation with Plug&Play Kendall's tau Ranking Loss, ICML 2025
        (arXiv 2409.17823). ``product``: Zheng et al., DiffKendall, NeurIPS 2023 (arXiv 2307.15317).
    """
    _check(student, teacher, weight, form, steepness)
    weight = None if weight is None else weight.detach().to(wide_dtype(student, teacher)).contiguous()
    if choose(backend, student, teacher, no_kernel=None) == "reference":
        return rkkd_rows(student, teacher, weight, FORMS.index(form), steepness)
    if form == "sigmoid":  # 2 sigmoid(x) - 1 = tanh(x / 2)
        form, steepness = "tanh", steepness / 2
    return fused("rkkd", student, teacher, weight, FORMS.index(form), steepness)[0]


def _check(student: Tensor, teacher: Tensor, weight: Tensor | None, form: str, steepness: float) -> None:
    for name, logits in (("student", student), ("teacher", teacher)):
        if not logits.is_floating_point():
            raise TypeError(
                f"expected `{name}` of a floating-point dtype, got {logits.dtype}; convert it first"
            )
    shape = tuple(student.shape)
    if len(shape) not in (2, 3):
        raise ValueError(f"expected `student` of shape (N, C) or (N, C, M), got {shape}")
    if tuple(teacher.shape) != shape:
        raise ValueError(f"expected `teacher` of shape {shape} like `student`, got {tuple(teacher.shape)}")
    if shape[1] < 2:
        raise ValueError(
            f"expected two classes or more, as a rank correlation compares pairs, got {shape[1]}"
        )
    rows = shape[:1] + shape[2:]
    if weight is not None and tuple(weight.shape) != rows:
        raise ValueError(f"expected `weight` of shape {rows}, one number a row, got {tuple(weight.shape)}")
    if form not in FORMS:
        raise ValueError(f"expected `form` to be one of {', '.join(map(repr, FORMS))}, got {form!r}")
    if not (math.isfinite(steepness) and steepness > 0):
        raise ValueError(f"expected `steepness` above 0 and finite, got {steepness}")
