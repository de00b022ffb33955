"""KD compared with logit matching: the distance of a temperature from the limit of infinite temperature.

With *a* and *b* the student's and the teacher's logits *s* and *t* minus their means over the classes,

    L_KD(T) = T² KL(softmax(t/T) || softmax(s/T))  ->  L_inf = ½ <(a - b)²>     as T grows,
    L_inf   = L_LM + R,    L_LM = ½ <(s - t)²>,    R = -½ (<s> - <t>)²,

where <.> is the mean over the classes: KD at infinite temperature is logit matching without its penalty on
different means. The rate is ``L_KD(T) = L_inf + c1/T + O(1/T²)`` with
``c1 = <a³>/6 + <b³>/3 - <a b²>/2``. The gradients of KD and of cross-entropy have mean zero over the classes.

The paper below states that KD tends to logit matching plus an extra term. We have read its abstract only; the
terms, the rate *c1* and their proofs are our own, checked in float64.

References:
    Chen et al., Exploring the Connection between Knowledge Distillation and Logits Matching, arXiv
    2109.06458.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..losses.functional import kd_loss, logit_matching_loss
from ._rows import check_finite, check_same_shape, check_temperature

TEMPERATURES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 1024.0)


@dataclass(frozen=True)
class AtTemperature:
    """KD at one temperature compared with its limit; means over the rows.

    Attributes:
        temperature: Temperature, no unit.
        kd: ``T²`` times the KL divergence, nats.
        predicted: ``L_inf + c1 / T``, the first-order prediction of ``kd``.
        remainder: ``kd - L_inf``.
        distance: ``|kd - L_inf| / L_inf``; None if the limit is 0.
        cosine_limit: Cosine of the gradients of KD and of its limit, all rows taken as one vector; None if
            one of them is 0.
        cosine_matching: Cosine of the gradients of KD and of logit matching, likewise.
        gradient_sum: Largest absolute sum over the classes of a row's gradient, as a share of the sum of its
            absolute values: 0 up to rounding.
    """

    temperature: float
    kd: float
    predicted: float
    remainder: float
    distance: float | None
    cosine_limit: float | None
    cosine_matching: float | None
    gradient_sum: float


@dataclass(frozen=True)
class Limits:
    """KD and logit matching of one student and teacher; means over the rows.

    Attributes:
        rows: Number of rows.
        matching: ``L_LM``, half the mean squared difference of the logits.
        regularization: ``R``, at most 0: removes the penalty of logit matching on different means.
        limit: ``L_inf = matching + regularization``.
        c1: First-order coefficient: ``(kd - limit) * T`` tends to it as T grows.
        mean_gap: Mean over the rows of ``<s> - <t>``.
        mean_gap_deviation: Standard deviation of the gap over the rows; a constant gap can be removed from a
            head by `luce.models.center_head_`.
        matching_gradient_sum: `AtTemperature.gradient_sum` of logit matching: 0 only without a gap.
        chosen: KD at the chosen temperature.
        sweep: KD at the temperatures to compare with, in ascending order.
    """

    rows: int
    matching: float
    regularization: float
    limit: float
    c1: float
    mean_gap: float
    mean_gap_deviation: float
    matching_gradient_sum: float
    chosen: AtTemperature
    sweep: tuple[AtTemperature, ...]

    @property
    def verdict(self) -> str:
        """The distance of the chosen temperature from the limit, in a sentence."""
        at = self.chosen
        if at.distance is None or at.cosine_limit is None:
            return "The logits of student and teacher agree up to a constant: KD is 0 at every temperature."
        return (
            f"At T = {at.temperature:g} KD differs by {100 * at.distance:.1f}% from its limit at infinite "
            f"temperature; the cosine of their gradients is {at.cosine_limit:.4f}. Close to 0% and 1, a "
            "higher temperature changes nothing but rounding."
        )


def limits(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float = 4.0,
    temperatures: Sequence[float] = TEMPERATURES,
) -> Limits:
    """Compare KD with logit matching over temperatures, in float64.

    Args:
        student_logits: Finite unnormalised log-scores, ``(N, C)``.
        teacher_logits: Same shape.
        temperature: The chosen temperature. Positive, no unit.
        temperatures: Temperatures to compare it with.
    Raises:
        ValueError: If shapes differ, a logit is not finite, or a temperature is not positive.
        TypeError: If a dtype is wrong.
    Example:
        >>> student_logits = torch.tensor([[2.0, -0.5, 0.5, 1.0]])
        >>> found = limits(student_logits, torch.tensor([[4.0, 1.0, -1.0, 2.0]]), temperature=100.0)
        >>> found.limit, found.matching, found.regularization
        (0.90625, 1.1875, -0.28125)
        >>> found.verdict.partition(";")[0]
        'At T = 100 KD differs by 0.8% from its limit at infinite temperature'

    References:
        See the module's docstring.
    """
    check_finite("student_logits", student_logits)
    check_finite("teacher_logits", teacher_logits)
    check_same_shape("teacher_logits", teacher_logits, "student_logits", student_logits)
    for value in (temperature, *temperatures):
        check_temperature(value)
    s, t = student_logits.detach().double(), teacher_logits.detach().double()
    a, b = s - s.mean(-1, keepdim=True), t - t.mean(-1, keepdim=True)
    gap = s.mean(-1) - t.mean(-1)
    matching, matching_gradient = _with_gradient(
        lambda z: 0.5 * logit_matching_loss(z, t, reduction="sum"), s
    )
    apart = a - b
    if apart.abs().max() <= 1e-12 * (s.abs().max() + t.abs().max()):
        # A common offset of the logits leaves rounding noise, and a cosine with noise means nothing.
        apart = torch.zeros_like(apart)
    limit, limit_gradient = 0.5 * apart.square().mean().item(), apart / s.shape[-1]
    c1 = (a**3 / 6 + b**3 / 3 - a * b**2 / 2).mean().item()
    rows = len(s)

    def at(temperature: float) -> AtTemperature:
        kd, gradient = _with_gradient(lambda z: kd_loss(z, t, temperature=temperature, reduction="sum"), s)
        return AtTemperature(
            temperature=float(temperature),
            kd=kd / rows,
            predicted=limit + c1 / temperature,
            remainder=kd / rows - limit,
            distance=abs(kd / rows - limit) / limit if limit else None,
            cosine_limit=_cosine(gradient, limit_gradient),
            cosine_matching=_cosine(gradient, matching_gradient),
            gradient_sum=_largest_sum(gradient),
        )

    return Limits(
        rows=rows,
        matching=matching / rows,
        regularization=-0.5 * gap.square().mean().item(),
        limit=limit,
        c1=c1,
        mean_gap=gap.mean().item(),
        mean_gap_deviation=gap.std(correction=0).item(),
        matching_gradient_sum=_largest_sum(matching_gradient),
        chosen=at(temperature),
        sweep=tuple(map(at, temperatures)),
    )


def _with_gradient(loss: Callable[[Tensor], Tensor], logits: Tensor) -> tuple[float, Tensor]:
    logits = logits.clone().requires_grad_()
    value = loss(logits)
    (gradient,) = torch.autograd.grad(value, logits)
    return value.item(), gradient


def _cosine(one: Tensor, other: Tensor) -> float | None:
    norm = math.sqrt(one.square().sum().item() * other.square().sum().item())
    return (one * other).sum().item() / norm if norm else None


def _largest_sum(gradient: Tensor) -> float:
    size = gradient.abs().sum(-1)
    return (gradient.sum(-1).abs() / torch.where(size == 0, 1, size)).max().item()
