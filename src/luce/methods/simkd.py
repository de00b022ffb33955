"""SimKD: a student that ends in its teacher's classifier."""

from __future__ import annotations

from torch import nn

from ..errors import UserError
from ..models.hooks import find
from ..signals import Teacher
from .base import Batch
from .features import FeatureMethod


class SimKD(FeatureMethod):
    """A `FeatureMethod` that first gives the student its teacher's classifier, which stays as it is.

    The student is a network ``simkd:NAME`` (`luce.models.simkd`): the network of that name, a projector, and
    pooling and head of the teacher's form. Trained, evaluated and exported is that whole network, so that
    its parameters and operations are counted in full. The paper descends `luce.SimKDLoss` between both
    networks' ``neck`` alone, without cross-entropy; other terms may be added.

    Projector and loss are those of the authors' code.

    Example:
        >>> import torch
        >>> from luce import SimKDLoss, models
        >>> from luce.signals import LiveTeacher
        >>> options = {"classes": 10, "input_shape": (1, 8, 8)}
        >>> teacher = LiveTeacher(models.build("cnn", widths=[8, 16, 32], **options))
        >>> student = models.build(
        ...     "simkd:cnn", widths=[4, 8], teacher="cnn", teacher_options={"widths": [8, 16, 32]}, **options
        ... )
        >>> method = SimKD(None, {"simkd": (1.0, SimKDLoss(), ["neck"], ["neck"])})
        >>> batch = {"input": torch.rand(4, 1, 8, 8), "target": torch.arange(4)}
        >>> method.build(student, teacher, batch, batch)
        >>> torch.equal(student.head.weight, teacher.network.head.weight)
        True

    References:
        Chen et al., Knowledge Distillation with the Reused Teacher Classifier, CVPR 2022, arXiv 2203.14001.
    """

    def build(self, student: nn.Module, teacher: Teacher | None, sample: Batch, rows: Batch) -> None:
        super().build(student, teacher, sample, rows)
        assert teacher is not None
        assert teacher.network is not None  # no other has features
        ours, theirs = find(student, "head"), find(teacher.network, "head")
        try:
            ours.load_state_dict(theirs.state_dict())
        except RuntimeError as error:
            raise UserError(
                "expected a student with a head like the teacher's for SimKD; build it as `simkd:NAME` with "
                f"the teacher's name and options, got {ours} for {theirs}"
            ) from error
        ours.requires_grad_(False)
