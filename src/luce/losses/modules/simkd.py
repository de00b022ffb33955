"""SimKD: the student's map becomes the teacher's, whose classifier reads it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .. import _features
from ..functional.maps import fitnet_loss
from .features import FeatureLoss, Shapes, channels

__all__ = ["SimKDLoss"]


@dataclass(eq=False, repr=False, kw_only=True)
class SimKDLoss(FeatureLoss):
    """Mean-square error between the student's projected last map and the teacher's. Weight 1.

    The loss has no parameters: the projector and the teacher's classifier are parts of the student, in
    training and afterwards. `luce.methods.FeatureMethod` copies the classifier. The paper applies this loss
    to both networks' ``neck``, without cross-entropy.

    Shape:
        One map of each network, ``(N, C', H, W)``, with equal channels; the larger is average-pooled to the
        size of the smaller.

    Example:
        >>> import torch
        >>> SimKDLoss()([torch.zeros(1, 2, 2, 2)], [torch.full((1, 2, 4, 4), 3.0)])
        tensor(9.)

    References:
        Chen et al., Knowledge Distillation with the Reused Teacher Classifier, CVPR 2022, arXiv 2203.14001.
    """

    takes = "maps"
    stages = "one"
    reuses_classifier = True

    def _make(self, student_shapes: Shapes, teacher_shapes: Shapes) -> None:
        for student, teacher in channels(student_shapes, teacher_shapes):
            if student != teacher:
                raise ValueError(
                    f"expected as many channels as the teacher's {teacher} for SimKDLoss, got {student}; "
                    "name `neck` of a student `simkd:NAME`, behind its projector, and `neck` of its teacher"
                )

    @property
    def learns(self) -> bool:
        return False

    def _stage(self, stage: int, student: Tensor, teacher: Tensor) -> Tensor:
        return fitnet_loss(*_features.maps(student, teacher))
