"""Choose a temperature from a teacher's logits."""

from __future__ import annotations

import math

from torch import Tensor

from .. import checks

COLDEST, HOTTEST = 1e-2, 1e3
CHUNK = 1 << 24
"""Largest number of entries converted to float64 at a time, which bounds memory."""


def first_place(teacher_logits: Tensor, temperature: float = 1.0, *, class_dim: int = 1) -> float:
    """Return the mean probability of the teacher's first choice: PLD's weight of the first place.

    Args:
        teacher_logits: Shape ``(N, C)``, ``(N, C, ...)`` or, with ``class_dim=-1``, ``(..., C)``.
        temperature: Positive, no unit.
        class_dim: Dimension of the classes.
    Returns:
        From ``1 / C`` to 1; NaN if a row holds NaN.
    Example:
        >>> import torch
        >>> round(first_place(torch.tensor([[0.0, math.log(3)], [0.0, 0.0]])), 6)  # the mean of 3/4 and 1/2
        0.625
    """
    checks.check_positive(temperature=temperature)
    return _first_place(_rows(teacher_logits, class_dim), temperature)


def suggest_temperature(teacher_logits: Tensor, *, first_place: float = 0.9, class_dim: int = 1) -> float:
    r"""Return the temperature at which the teacher's first choice has a given mean probability.

    .. math:: \tau:\quad \frac1N \sum_n \max_i \mathrm{softmax}(t_n / \tau)_i = \mathrm{first\_place}

    PLD weighs each place of the ranking with the teacher's probability. A teacher is nearly certain on the
    rows that it was trained on; then the places after the first weigh nothing, and PLD becomes cross-entropy.
    A higher temperature gives them weight. The mean falls as the temperature rises, so there is one solution.

    Args:
        teacher_logits: Of the rows to train on, ``(N, C)``, ``(N, C, ...)`` or, with ``class_dim=-1``,
            ``(..., C)``.
        first_place: The target mean, between 0 and 1.
        class_dim: Dimension of the classes.
    Returns:
        No unit, clamped to [0.01, 1000].
    Raises:
        ValueError: On a wrong shape or value, or logits that are NaN or ``+inf``.
        TypeError: On a wrong dtype.
    Example:
        >>> import torch
        >>> logits = torch.tensor([[0.0, 4.0]])
        >>> tau = suggest_temperature(logits, first_place=0.75)  # 4 / tau = log 3
        >>> round(tau, 3), round(4 / math.log(3), 3)
        (3.641, 3.641)

    References:
        A heuristic of this library: in our study (benchmarks/results/temperature) no target mean was best on
        all data sets.
    """
    checks.check_between(0, 1, first_place=first_place)
    rows = _rows(teacher_logits, class_dim)
    # NaN > x is False: the search would silently end at COLDEST.
    if not math.isfinite(_first_place(rows, 1.0)):
        raise ValueError("expected `teacher_logits` without NaN and +inf and with at least one row")
    # In the logarithm, so that the relative error is the same for all temperatures.
    low, high = math.log(COLDEST), math.log(HOTTEST)
    for _ in range(24):  # to a relative error of 1e-6
        middle = (low + high) / 2
        if _first_place(rows, math.exp(middle)) > first_place:
            low = middle
        else:
            high = middle
    return math.exp((low + high) / 2)


def _rows(logits: Tensor, class_dim: int) -> Tensor:
    checks.check_logits("teacher_logits", logits)
    axis = checks.class_axis(logits, class_dim)
    return logits.detach().movedim(axis, -1).reshape(-1, logits.shape[axis])


def _first_place(rows: Tensor, temperature: float) -> float:
    total = 0.0
    # `split` raises on chunks of 0 rows, which more than CHUNK classes would give.
    for chunk in rows.split(max(1, CHUNK // rows.shape[1])):
        # MPS has no float64.
        worth = chunk if chunk.device.type == "mps" else chunk.double()
        # With the maximum subtracted the largest term is 1, so the first choice's probability is 1 / sum.
        odds = ((worth - worth.amax(-1, keepdim=True)) / temperature).exp().sum(-1)
        # A Python float is float64 on every device, so many chunks lose no digits.
        total += (1 / odds).sum().item()
    return total / len(rows) if len(rows) else math.nan
