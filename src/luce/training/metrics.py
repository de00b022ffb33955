"""Figures of a classifier, and of its agreement with its teacher."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader

from .. import stops
from ..errors import UserError
from ..labels import has_label
from ..losses.functional import kd_loss
from ..signals import Teacher

BINS = 15
"""Of the calibration error, as in Guo et al., On Calibration of Modern Neural Networks, arXiv 1706.04599."""
KENDALL_ROWS = 256
"""Rows for Kendall's tau, which compares all pairs of classes: more rows cost much and change little."""
END = 0.1
"""Share of the classes at either end of the teacher's order, as in RKKD (arXiv 2409.17823)."""


@torch.no_grad()
def collect(
    student: nn.Module,
    loader: DataLoader[Any],
    accelerator: Accelerator,
    teacher: Teacher | None = None,
    *,
    finish: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Return student logits, teacher logits and targets of all rows, in order, as float32 on the CPU.

    Ctrl-C ends it after a batch, and so does SIGTERM unless `finish` is true.
    """
    student.eval()
    rows: list[tuple[Tensor, ...]] = []
    with stops.noted():
        for batch in loader:
            with accelerator.autocast():
                outputs = [student(batch["input"])]
                if teacher is not None:
                    outputs.append(teacher.signal(batch).logits)
            # Drops the rows that were repeated so that all processes have equally many.
            gathered = accelerator.gather_for_metrics((*outputs, batch["target"]))
            # On the CPU, since the logits of a whole test set may not fit on the device.
            rows.append(tuple(part.cpu() for part in gathered))
            stops.check(finishing=finish)
    *logits, target = (torch.cat(column) for column in zip(*rows, strict=True))
    return logits[0].float(), logits[1].float() if teacher is not None else None, target


def labelled(student_logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rows that have a label; the others would count as wrong.

    Raises:
        UserError: If there is none.
    """
    known = has_label(target)
    if not bool(known.any()):
        raise UserError(f"expected rows with a label to measure accuracy on, got none in {len(target)} rows")
    return (student_logits, target) if bool(known.all()) else (student_logits[known], target[known])


def brief(student_logits: Tensor, target: Tensor) -> dict[str, float]:
    """Return the validation figures of an epoch: accuracy, and cross-entropy in nats, of labelled rows."""
    student_logits, target = labelled(student_logits, target)
    return {
        "accuracy": (student_logits.argmax(-1) == target).float().mean().item(),
        "loss": F.cross_entropy(student_logits, target).item(),
    }


def full(student_logits: Tensor, teacher_logits: Tensor | None, target: Tensor) -> dict[str, Any]:
    """Return all figures for a report.

    Args:
        student_logits: ``(N, C)``.
        teacher_logits: ``(N, C)``, or None.
        target: ``(N,)`` class indices, -1 or -100 in rows without a label.
    Returns:
        Of the labelled rows ``accuracy`` and ``calibration_error`` (expected, 15 bins) as fractions, ``nll``
        in nats, bars of a ``reliability`` diagram. With a teacher, of all rows: ``agreement`` of the first
        choices, ``kl`` from teacher to student in nats, mean ``kendall_tau`` of the rows' class orders,
        ``topk_overlap``, the shared fraction of both networks' first ``topk`` classes; and, of the tenth of
        the classes that the teacher ranks first in each row (``top``) and last (``bottom``), rounded and at
        least two, ``kendall_tau_top`` and ``kendall_tau_bottom`` within them, and ``kl_gradient_top`` and
        ``kl_gradient_bottom``, their share of the KL divergence's gradient, ``|q - p|`` summed over the rows.
    Raises:
        UserError: If no row has a label.
    """
    from torchmetrics.functional.classification import multiclass_calibration_error

    classes = student_logits.shape[-1]
    known_logits, target = labelled(student_logits, target)
    probabilities = known_logits.softmax(-1)
    scores = brief(known_logits, target)
    result: dict[str, Any] = {
        "accuracy": scores["accuracy"],
        "nll": scores["loss"],
        # torchmetrics raises below 2 classes.
        "calibration_error": multiclass_calibration_error(
            probabilities, target, num_classes=max(classes, 2), n_bins=BINS
        ).item(),
        "reliability": _reliability(probabilities, target),
    }
    if teacher_logits is not None:
        # At most half of the classes: the overlap of all of them is always 1.
        topk = max(1, min(5, classes // 2))
        first = [
            F.one_hot(logits.topk(topk).indices, classes).sum(1)
            for logits in (student_logits, teacher_logits)
        ]
        result["agreement"] = (student_logits.argmax(-1) == teacher_logits.argmax(-1)).float().mean().item()
        result["kl"] = kd_loss(student_logits, teacher_logits).item()
        result["kendall_tau"] = _kendall_tau(student_logits, teacher_logits)
        result["topk"] = topk
        result["topk_overlap"] = ((first[0] * first[1]).sum(-1) / topk).mean().item()
        size = min(max(2, round(END * classes)), classes)
        # Stable: which of several equal classes fall into an end must not depend on the device.
        order = teacher_logits.argsort(dim=-1, descending=True, stable=True)
        # float64: the differences of nearly equal probabilities cancel in float32.
        slope = (student_logits.double().softmax(-1) - teacher_logits.double().softmax(-1)).abs()
        # Equal networks have shares of 0, where 0 / 0 would raise.
        total = slope.sum().item() or 1.0
        for end, ranked in (("top", order[:, :size]), ("bottom", order[:, -size:])):
            students, teachers = student_logits.gather(-1, ranked), teacher_logits.gather(-1, ranked)
            result[f"kendall_tau_{end}"] = _kendall_tau(students, teachers)
            result[f"kl_gradient_{end}"] = slope.gather(-1, ranked).sum().item() / total
    return result


def _kendall_tau(student_logits: Tensor, teacher_logits: Tensor) -> float:
    """Return the mean tau-b of the first rows, without rows whose classes all tie and have no order."""
    from torchmetrics.functional.regression import kendall_rank_corrcoef

    columns = student_logits[:KENDALL_ROWS].T, teacher_logits[:KENDALL_ROWS].T
    # A row that either network ranks as all equal has no tau: it is NaN.
    return cast(Tensor, kendall_rank_corrcoef(*columns)).nanmean().item()


def _reliability(probabilities: Tensor, target: Tensor) -> list[dict[str, float]]:
    confidence, choice = probabilities.max(-1)
    correct = (choice == target).float()
    # A confidence of exactly 1 would open a bin of its own.
    bins = (confidence * BINS).long().clamp(max=BINS - 1)
    return [
        {
            "confidence": confidence[inside].mean().item(),
            "accuracy": correct[inside].mean().item(),
            "count": int(inside.sum()),
        }
        for inside in (bins == b for b in range(BINS))
        if inside.any()
    ]
