"""Modules of the losses between rows of a batch; the functions of the same names define the formulas."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ... import checks
from .. import _features
from ..functional import embeddings
from .features import FeatureLoss, Shapes, through

__all__ = ["CCLoss", "PKTLoss", "RKDLoss", "SPLoss"]


@dataclass(eq=False, repr=False, kw_only=True)
class SPLoss(FeatureLoss):
    """Module of `luce.sp_loss`: similarity preserved, summed over the stages. Its weight is 3000."""

    takes = "maps"
    function = staticmethod(embeddings.sp_loss)


@dataclass(eq=False, repr=False, kw_only=True)
class PKTLoss(FeatureLoss):
    """Module of `luce.pkt_loss`: probabilistic knowledge transfer. Its weight is 30000."""

    takes = "vectors"
    stages = "one"
    function = staticmethod(embeddings.pkt_loss)

    eps: float = 1e-7


@dataclass(eq=False, repr=False, kw_only=True)
class RKDLoss(FeatureLoss):
    """Module of `luce.rkd_loss`: relational knowledge distillation. Its weight is 1."""

    takes = "vectors"
    stages = "one"
    function = staticmethod(embeddings.rkd_loss)

    distance_weight: float = 25.0
    angle_weight: float = 50.0


@dataclass(eq=False, repr=False, kw_only=True)
class CCLoss(FeatureLoss):
    """Module of `luce.cc_loss`: correlation congruence.

    The consecutive form, with weight 0.02, embeds both networks' features linearly in `dim` dimensions. As in
    the benchmark code, both embeddings are trained, and nothing prevents them from shrinking to 0 together.

    Args:
        form: ``"kernel"``, without parameters, or ``"consecutive"``.
        gamma: Of the Gaussian kernel.
        order: Of its expansion.
        dim: Of the embeddings.
    """

    takes = "vectors"
    stages = "one"

    form: Literal["kernel", "consecutive"] = "kernel"
    gamma: float = 0.4
    order: int = 2
    dim: int = 128

    @property
    def learns(self) -> bool:
        return self.form == "consecutive"

    def _check_options(self) -> None:
        checks.check_count(most=checks.WIDEST, dim=self.dim)
        one = torch.zeros(1, 1)
        embeddings.cc_loss(one, one, form=self.form, gamma=self.gamma, order=self.order)

    def _make(self, student_shapes: Shapes, teacher_shapes: Shapes) -> None:
        if self.learns:
            self.embed_student = nn.Linear(student_shapes[0][0], self.dim)
            self.embed_teacher = nn.Linear(teacher_shapes[0][0], self.dim)
        self._try(student_shapes, teacher_shapes)

    def _stage(self, stage: int, student: Tensor, teacher: Tensor) -> Tensor:
        if not self.learns:
            return embeddings.cc_loss(student, teacher, form=self.form, gamma=self.gamma, order=self.order)
        s, t = _features.vectors(student, teacher)
        e_s, e_t = through(self.embed_student, s), through(self.embed_teacher, t)
        return embeddings.consecutive_products(e_s.to(s.dtype), e_t.to(s.dtype))
