"""KD at temperatures given as tensors: one per row, or trained."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import checks
from ...ops.kd.reference import forward_kl
from .._reduce import Reduction, Rows


def tempered_kd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor | None = None,
    *,
    temperature: Tensor,
    ignore_index: int = -100,
    class_dim: int = 1,
    row_weight: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""`luce.kd_loss` at a temperature that may differ by row and that may be trained.

    .. math:: T_n^2\,\mathrm{KL}\big(\mathrm{softmax}(t_n/T_n) \,\|\, \mathrm{softmax}(s_n/T_n)\big)

    Args:
        student_logits: Shape ``(N, C)``, ``(N, C, ...)`` or, with ``class_dim=-1``, ``(..., C)``.
        teacher_logits: Same shape; receives no gradient.
        target: Class indices, used only to drop rows labelled `ignore_index`.
        temperature: Positive, which is not checked; a scalar, or one per row in the shape of the logits
            without their class dimension. Receives its gradient, through the leading square as well.
        ignore_index: Rows with this label do not count.
        class_dim: Dimension of the classes.
        row_weight: One weight per row, at least 0; the mean divides by their sum.
        reduction: ``"none"``, ``"mean"`` per kept row, or ``"sum"``.
    Returns:
        Nats times the squared temperatures.
    Raises:
        ValueError: On a wrong shape or value.
        TypeError: On a wrong dtype.
    Example:
        >>> student_logits = torch.tensor([[0.5, -1.0, 2.0, 0.3]])
        >>> teacher_logits = torch.tensor([[2.0, 1.0, 0.1, -1.0]])
        >>> tempered_kd(student_logits, teacher_logits, temperature=torch.tensor([4.0]))
        tensor(1.4214)
    """
    rows = Rows.of(
        student_logits, teacher_logits, target, row_weight, class_dim=class_dim, ignore_index=ignore_index
    )
    one_for_all = isinstance(temperature, Tensor) and temperature.ndim == 0
    shape = torch.Size() if one_for_all else rows.shape
    checks.check_per_row("temperature", temperature, shape, student_logits)
    # A wrong temperature of a row that does not count must not reach the result as NaN.
    each = torch.where(rows.weight == 0, 1, temperature.reshape(-1).to(rows.student.dtype))
    return rows.reduce(each**2 * forward_kl(rows.student, rows.teacher, each[:, None]), reduction)
