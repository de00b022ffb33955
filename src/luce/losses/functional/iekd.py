"""Losses of IE-KD: one part of the student's feature is attracted by the teacher's, another repelled."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from ... import checks
from .. import _features
from .._features import Two, unit

__all__ = ["exploration_loss", "inheritance_loss"]

Form = Literal["l1", "cosine"]
FORMS = ("l1", "cosine")


def inheritance_loss(student_features: Tensor, teacher_features: Tensor, *, form: Form = "l1") -> Tensor:
    r"""Distance between the directions of the student's rows and those of the teacher's.

    .. math:: \text{l1:}\quad \frac{1}{N D} \sum_{nd} |\nu(s_n) - \nu(t_n)|_d, \qquad
        \text{cosine:}\quad \frac{1}{N} \sum_n (1 - \langle \nu(s_n), \nu(t_n) \rangle)

    with :math:`\nu(x) = x / \|x\|_2` of the flattened row, of D entries. As in the authors' code. The mean
    over D makes ``"l1"`` small: it is at most :math:`2 / \sqrt D`, 0.044 for factors of 32 channels and 8x8
    places.

    Args:
        student_features: Shape ``(N, ...)``, flattened row by row; in IE-KD the factors of one part.
        teacher_features: As many entries in a row; receives no gradient.
        form: ``"l1"``, the authors' choice, or ``"cosine"``.
    Returns:
        From 0, where the directions are equal, to ``2 / sqrt(D)`` or 2. Invariant to a positive factor on
        any row. A row of zeros stays 0 and has no gradient.
    Raises:
        ValueError: On a wrong shape or value.
        TypeError: On a wrong dtype.
    Example:
        >>> import torch
        >>> student, teacher = torch.tensor([[3.0, 4.0]]), torch.tensor([[4.0, 3.0]])
        >>> inheritance_loss(student, teacher)  # between (0.6, 0.8) and (0.8, 0.6)
        tensor(0.2000)
        >>> inheritance_loss(student, teacher, form="cosine")  # 1 - 0.96
        tensor(0.0400)

    References:
        Huang et al., Revisiting Knowledge Distillation: An Inheritance and Exploration Framework, CVPR 2021,
        arXiv 2107.00181.
    """
    checks.check_choice("form", form, FORMS)
    s, t = _directions(student_features, teacher_features)
    return (s - t).abs().mean() if form == "l1" else (1 - (s * t).sum(1)).mean()


def exploration_loss(student_features: Tensor, teacher_features: Tensor, *, form: Form = "l1") -> Tensor:
    r"""Closeness of the directions of the student's rows to those of the teacher's.

    .. math:: \text{l1:}\quad -\frac{1}{N D} \sum_{nd} |\nu(s_n) - \nu(t_n)|_d, \qquad
        \text{cosine:}\quad \frac{1}{N} \sum_n |\langle \nu(s_n), \nu(t_n) \rangle|

    as in the authors' code. The two have different minima. ``"l1"`` is `inheritance_loss` with the opposite
    sign, lowest for the opposite direction (among rows without negative entries, for one that shares no
    positive entry with the teacher's). ``"cosine"`` is lowest at right angles.

    Args:
        student_features: Shape ``(N, ...)``, flattened row by row; in IE-KD the factors of one part.
        teacher_features: As many entries in a row; receives no gradient.
        form: ``"l1"``, the authors' choice, or ``"cosine"``.
    Returns:
        From ``-2 / sqrt(D)`` to 0, or from 0 to 1. Invariant to a positive factor on any row. A row of
        zeros stays 0 and has no gradient.
    Raises:
        ValueError: On a wrong shape or value.
        TypeError: On a wrong dtype.
    Example:
        >>> import torch
        >>> student, teacher = torch.tensor([[3.0, 4.0]]), torch.tensor([[4.0, 3.0]])
        >>> exploration_loss(student, teacher)  # between (0.6, 0.8) and (0.8, 0.6)
        tensor(-0.2000)
        >>> exploration_loss(student, teacher, form="cosine")  # 0.6 * 0.8 + 0.8 * 0.6
        tensor(0.9600)

    References:
        Huang et al., Revisiting Knowledge Distillation: An Inheritance and Exploration Framework, CVPR 2021,
        arXiv 2107.00181.
    """
    if form == "l1":
        return -inheritance_loss(student_features, teacher_features)
    checks.check_choice("form", form, FORMS)
    s, t = _directions(student_features, teacher_features)
    return (s * t).sum(1).abs().mean()


def _directions(student_features: Tensor, teacher_features: Tensor) -> Two:
    s, t = _features.rows(student_features, teacher_features)
    checks.check_like("student_features", s, t, "`luce.IEKDLoss` has the encoders that make them alike")
    return unit(s, dim=1), unit(t, dim=1)
