"""ReviewKD: fuse the student's maps from the deepest stage upwards and match each fused map."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import checks
from .. import _features
from .features import FeatureLoss, Shapes, Tensors, through

__all__ = ["ReviewKDLoss"]

LEVELS = (4, 2, 1)


@dataclass(eq=False, repr=False, kw_only=True)
class ReviewKDLoss(FeatureLoss):
    r"""Knowledge review: the student's maps, fused from the deepest to the first, against the teacher's.

    From the deepest stage on, each map :math:`F_i` of the student is projected to ``middle`` channels and
    fused with the deeper result (ABF: the deeper map is enlarged to its size, and two attention maps with one
    value per place weigh the two), :math:`R_i = a_i \odot \mathrm{conv}(F_i) + b_i \odot
    \mathrm{up}(R_{i+1})`. The result is projected to the teacher's size and channels. The loss is the sum of
    `hierarchical_context_loss` over the stages.

    The features are given from the first stage to the deepest, usually followed by the pooled vector, which
    counts as a map of one place. The authors take maps *before* the activation: in our residual networks
    ``stages.0.-1.act:input`` and so on, in the wide ones, which end a stage without activation, ``stages.0``.
    They multiply the loss by 0.6 to 8 depending on the pair, and let it grow over 20 epochs (``warmup: 20``).

    The fusion, its normalisation and initialisation, and the loss follow the authors' code, with one
    difference: a batch that leaves a single value per channel, which cannot be normalised by itself, is
    normalised by the running statistics.

    Args:
        middle: Channels of the fused maps, at most those of the student's deepest feature.

    Shape:
        Features ``(N, C', H, W)`` or ``(N, D)``, as many of the student as of the teacher, of any size.

    Raises:
        ValueError: On other shapes, or a ``middle`` that is not positive.

    Example:
        >>> loss = ReviewKDLoss()
        >>> loss.build([(8, 8, 8), (16, 4, 4), (16,)], [(16, 8, 8), (32, 4, 4), (32,)])
        >>> student = [torch.rand(2, 8, 8, 8), torch.rand(2, 16, 4, 4), torch.rand(2, 16)]
        >>> loss(student, [torch.rand(2, 16, 8, 8), torch.rand(2, 32, 4, 4), torch.rand(2, 32)]).shape
        torch.Size([])

    References:
        Chen et al., Distilling Knowledge via Knowledge Review, CVPR 2021, arXiv 2104.09044.
    """

    takes = "maps"
    stages = "many"

    middle: int = 512

    def _check_options(self) -> None:
        checks.check_count(most=checks.WIDEST, middle=self.middle)

    def build(self, student_shapes: Shapes, teacher_shapes: Shapes) -> None:
        shapes = [[_as_map(shape) for shape in group] for group in (student_shapes, teacher_shapes)]
        for shape in (*shapes[0], *shapes[1]):
            if len(shape) != 3:
                raise ValueError(
                    "expected features of shape (C', H, W) or (D,) without the batch for ReviewKDLoss, "
                    f"got {tuple(shape)}"
                )
        super().build(*shapes)

    def _make(self, student_shapes: Shapes, teacher_shapes: Shapes) -> None:
        middle = min(self.middle, student_shapes[-1][0])
        deepest = len(student_shapes) - 1
        self.fusions = nn.ModuleList(
            Fusion(student[0], middle, teacher[0], deepest=stage == deepest)
            for stage, (student, teacher) in enumerate(zip(student_shapes, teacher_shapes, strict=True))
        )

    def forward(self, student_features: Tensors, teacher_features: Tensors) -> Tensor:
        """The loss of a batch, a scalar."""
        self._check_number(len(student_features), len(teacher_features))
        self._check_built()
        deeper, losses = None, []
        stages = list(zip(self.fusions, student_features, teacher_features, strict=True))
        for fusion, student, teacher in reversed(stages):
            s, t = _features.maps(_with_places(student), _with_places(teacher), pooled=False)
            fused, deeper = fusion(s, deeper, t.shape[-2:])
            losses.append(hierarchical_context_loss(fused, t))
        return torch.stack(losses).sum()


def hierarchical_context_loss(student: Tensor, teacher: Tensor) -> Tensor:
    r"""Mean-square errors of two maps at full size and pooled to 4x4, 2x2 and 1x1, averaged.

    :math:`\sum_k w_k \mathrm{MSE}_k / \sum_k w_k` with :math:`w = 1, 1/2, 1/4, \ldots` over the levels there
    are: those not smaller than the map are left out.

    Args:
        student: ``(N, C', H, W)``.
        teacher: Likewise.

    Example:
        >>> a, b = torch.tensor([1.0, 3.0, 5.0, 7.0]).view(1, 1, 2, 2), torch.zeros(1, 1, 2, 2)
        >>> hierarchical_context_loss(a, b).item()  # (21 + 16 / 2) / (1 + 1 / 2)
        19.33333396911621
    """
    student, teacher = _features.maps(student, teacher, pooled=False, like_channels=True)
    total, weights, weight = F.mse_loss(student, teacher), 1.0, 1.0
    for size in LEVELS:
        # Pooling to a square map's own size would count its error twice.
        if size < min(student.shape[-2:]):
            weight /= 2
            small_student, small_teacher = (F.adaptive_avg_pool2d(x, size) for x in (student, teacher))
            total, weights = total + weight * F.mse_loss(small_student, small_teacher), weights + weight
    return total / weights


class Fusion(nn.Module):
    """Attention-based fusion of a stage with the deeper ones.

    Args:
        inputs: Channels of the student's map.
        middle: Channels of the fused map that is passed to the stage above.
        outputs: Channels of the teacher's map.
        deepest: Whether there is no deeper stage.
    """

    def __init__(self, inputs: int, middle: int, outputs: int, *, deepest: bool) -> None:
        super().__init__()
        narrow = nn.Conv2d(inputs, middle, 1, bias=False)
        widen = nn.Conv2d(middle, outputs, 3, padding=1, bias=False)
        for convolution in (narrow, widen):
            # a=1 gives the gain 1 of a linear layer: no ReLU follows.
            nn.init.kaiming_uniform_(convolution.weight, a=1)
        self.narrow = nn.Sequential(narrow, Normalisation(middle))
        self.attention = None if deepest else nn.Sequential(nn.Conv2d(2 * middle, 2, 1), nn.Sigmoid())
        self.widen = nn.Sequential(widen, Normalisation(outputs))

    def forward(self, x: Tensor, deeper: Tensor | None, size: torch.Size) -> tuple[Tensor, Tensor]:
        """Return a map with the teacher's channels at this height and width, and the fused map."""
        x = through(self.narrow, x)
        if self.attention is not None:
            assert deeper is not None
            deeper = F.interpolate(deeper, x.shape[-2:], mode="nearest")
            own, other = self.attention(torch.cat([x, deeper], dim=1)).split(1, dim=1)
            x = x * own + deeper * other
        if x.shape[-2:] != size:
            x = F.interpolate(x, size, mode="nearest")
        return self.widen(x), x


class Normalisation(nn.BatchNorm2d):
    """Batch normalisation with the running statistics if the batch has a single value per channel."""

    def forward(self, x: Tensor) -> Tensor:
        if x.numel() > x.shape[1]:
            return super().forward(x)
        # With one value per channel the variance is 0, and PyTorch raises in training mode.
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)


def _as_map(shape: Sequence[int]) -> torch.Size:
    return torch.Size([*shape, 1, 1] if len(shape) == 1 else shape)


def _with_places(feature: Tensor) -> Tensor:
    return feature[:, :, None, None] if feature.ndim == 2 else feature
