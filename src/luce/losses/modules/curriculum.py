"""KD at a temperature that is trained adversarially to the student."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ... import checks
from .._teacher import refuse_teacher_gradient
from ..functional.curriculum import tempered_kd
from .base import LogitLoss

__all__ = ["CTKDLoss"]

HIDDEN = 64
"""Units of the hidden layer of the instance-wise temperature."""


def reversed_gradient(x: Tensor, strength: float) -> Tensor:
    """Return `x`; multiply its gradient by ``-strength`` in the backward pass.

    Example:
        >>> x = torch.tensor(3.0, requires_grad=True)
        >>> reversed_gradient(x, 0.5)
        tensor(3., grad_fn=<SubBackward0>)
        >>> torch.autograd.grad(reversed_gradient(x, 0.5), x)
        (tensor(-0.5000),)
    """
    return x.detach() - strength * (x - x.detach())


@dataclass(eq=False, repr=False, kw_only=True)
class CTKDLoss(LogitLoss):
    r"""Curriculum temperature: KD at a temperature that is learned to make the student's task harder.

    .. math:: T^2\,\mathrm{KL}\big(\mathrm{softmax}(t/T) \,\|\, \mathrm{softmax}(s/T)\big), \quad
        T = T_0 + R\,\mathrm{sigmoid}(\theta)

    The student descends this loss while theta ascends it: the gradient of theta is multiplied by
    :math:`-\lambda`, with :math:`\lambda = \frac\Lambda2 \big(1 - \cos(\pi \min(e/E, 1))\big)` in epoch *e*,
    counted from 1. Theta is one number, initially 1, or, instance-wise, the output of a small network on both
    networks' predictions for the row. It is a parameter of this module: pass it to the optimizer with the
    student's (`luce.distill` and recipes do). Weight decay pulls it towards the middle of the range.

    Formula, curriculum and defaults of the single temperature are those of the authors' code. Instance-wise,
    the paper describes a small network on both predictions. Its input of probabilities without a gradient to
    the student, its one hidden layer of 64 units and its equal initial temperature for all rows are our
    reconstruction.

    Args:
        classes: Number of classes, for one temperature per row. None for a single temperature.
        lowest_temperature: :math:`T_0`, positive, no unit.
        temperature_range: :math:`R`, positive, no unit.
        strength: :math:`\Lambda`, at least 0; at 0 the temperature does not change.
        curriculum_epochs: *E*, at least 0: epochs over which the strength grows. Without a call of
            `set_epoch` the strength has its full size.
    Raises:
        ValueError: On a wrong value, and on logits with another number of classes.
    Example:
        >>> loss = CTKDLoss()
        >>> student_logits, teacher_logits = torch.tensor([[0.5, -1.0, 2.0]]), torch.tensor([[2.0, 1.0, 0.1]])
        >>> loss.temperatures(student_logits, teacher_logits)  # 1 + 20 sigmoid(1)
        tensor(15.6212, grad_fn=<AddBackward0>)
        >>> loss(student_logits, teacher_logits)
        tensor(1.4867, grad_fn=<DivBackward0>)

    References:
        Li et al., Curriculum Temperature for Knowledge Distillation, AAAI 2023, arXiv 2211.16231.
    """

    classes: int | None = None
    lowest_temperature: float = 1.0
    temperature_range: float = 20.0
    strength: float = 1.0
    curriculum_epochs: float = 10.0

    def __post_init__(self) -> None:
        nn.Module.__init__(self)
        checks.check_positive(
            lowest_temperature=self.lowest_temperature, temperature_range=self.temperature_range
        )
        checks.check_not_negative(strength=self.strength, curriculum_epochs=self.curriculum_epochs)
        checks.check_reduction(self.reduction)
        self.epoch: int | None = None
        if self.classes is None:
            self.theta = nn.Parameter(torch.ones(()))
            return
        checks.check_count(most=checks.WIDEST, classes=self.classes)
        with torch.random.fork_rng(devices=[]):  # the same weights in every process, whatever its seed
            torch.manual_seed(0)
            hidden, last = nn.Linear(2 * self.classes, HIDDEN), nn.Linear(HIDDEN, 1)
        nn.init.zeros_(last.weight)
        nn.init.ones_(last.bias)
        self.theta_of = nn.Sequential(hidden, nn.ReLU(), last)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def reversal(self) -> float:
        """Return the factor of the reversed gradient in the current epoch."""
        if self.epoch is None or self.epoch >= self.curriculum_epochs:
            return self.strength
        return self.strength * (1 - math.cos(math.pi * self.epoch / self.curriculum_epochs)) / 2

    def temperatures(self, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        """Return one temperature, a scalar, or one per row, in the shape of the logits without classes."""
        theta = self.theta if self.classes is None else self._theta_of_rows(student_logits, teacher_logits)
        return (
            self.lowest_temperature
            + self.temperature_range * reversed_gradient(theta, self.reversal()).sigmoid()
        )

    def _theta_of_rows(self, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        refuse_teacher_gradient("CTKD with `classes`", "whose temperatures are learnt against it")
        checks.check_logits("student_logits", student_logits)
        checks.check_logits("teacher_logits", teacher_logits, like=student_logits)
        axis = checks.class_axis(student_logits, self.class_dim)
        if student_logits.shape[axis] != self.classes:
            raise ValueError(
                f"expected logits of `classes={self.classes}` classes, got {student_logits.shape[axis]}"
            )
        dtype = next(self.theta_of.parameters()).dtype
        seen = torch.cat(
            [logits.detach().to(dtype).softmax(axis) for logits in (student_logits, teacher_logits)], axis
        )
        # NaN in a row that does not count would otherwise reach the weights; in others the divergence has it.
        theta: Tensor = self.theta_of(seen.nan_to_num(0).movedim(axis, -1)).squeeze(-1)
        return theta

    def _call(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor | None,
        target: Tensor | None,
        row_weight: Tensor | None,
        **override: int,
    ) -> Tensor:
        checks.check_given("teacher_logits", teacher_logits)
        assert teacher_logits is not None
        return tempered_kd(
            student_logits,
            teacher_logits,
            target,
            temperature=self.temperatures(student_logits, teacher_logits),
            ignore_index=self.ignore_index,
            class_dim=self.class_dim,
            row_weight=row_weight,
            reduction=self.reduction,
        )
