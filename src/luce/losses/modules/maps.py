"""Modules of the losses between feature maps; the functions of the same names define the formulas."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import checks
from .. import _features
from ..functional import maps
from .features import FeatureLoss, Shapes, Tensors, aligned, channels, through

__all__ = [
    "ATLoss",
    "CWDLoss",
    "FSPLoss",
    "FitNetLoss",
    "ICKDLoss",
    "MGDLoss",
    "NSTLoss",
    "OFDLoss",
    "VIDLoss",
]


@dataclass(eq=False, repr=False, kw_only=True)
class ATLoss(FeatureLoss):
    """Module of `luce.at_loss`: attention transfer, summed over the stages. Its weight is 1000.

    Example:
        >>> ATLoss(p=4)
        ATLoss(p=4)
    """

    takes = "maps"
    function = staticmethod(maps.at_loss)

    p: float = 2.0


@dataclass(eq=False, repr=False, kw_only=True)
class NSTLoss(FeatureLoss):
    """Module of `luce.nst_loss`: neuron selectivity transfer, summed over the stages. Its weight is 50."""

    takes = "maps"
    function = staticmethod(maps.nst_loss)

    form: Literal["polynomial", "linear"] = "polynomial"


@dataclass(eq=False, repr=False, kw_only=True)
class FitNetLoss(FeatureLoss):
    """Module of `luce.fitnet_loss`, with the regressor from the student's map to the teacher's shape.

    The regressor is that of the benchmark code: a convolution, 3x3 with stride 2 if the student's map is
    twice as high, 4x4 transposed with stride 2 if half as high, else one without padding that trims the map
    to the teacher's size; then batch normalisation and a ReLU. The benchmark takes one stage, the second,
    with weight 100, and trains it together with the task; the paper, as we know it, trains the hint first.

    Args:
        relu: Whether the regressor ends in a ReLU; turn it off if the teacher's features may be negative.
    Example:
        >>> loss = FitNetLoss()
        >>> loss.build([torch.Size([8, 16, 16])], [torch.Size([32, 8, 8])])
        >>> loss.regressors[0][0]
        Conv2d(8, 32, kernel_size=(3, 3), stride=(2, 2), padding=(1, 1))
    """

    takes = "maps"

    relu: bool = True

    def _make(self, student_shapes: Shapes, teacher_shapes: Shapes) -> None:
        pairs = zip(student_shapes, teacher_shapes, strict=True)
        self.regressors = nn.ModuleList([self._regressor(s, t) for s, t in pairs])
        self._try(student_shapes, teacher_shapes)

    def _regressor(self, student: torch.Size, teacher: torch.Size) -> nn.Sequential:
        inputs, *size = _features.map_shape(student)
        outputs, *target = _features.map_shape(teacher)
        trim = [a - b for a, b in zip(size, target, strict=True)]
        convolution: nn.Module
        if size == [2 * length for length in target]:
            convolution = nn.Conv2d(inputs, outputs, 3, stride=2, padding=1)
        elif [2 * length for length in size] == target:
            convolution = nn.ConvTranspose2d(inputs, outputs, 4, stride=2, padding=1)
        elif min(trim) >= 0:
            convolution = nn.Conv2d(inputs, outputs, (1 + trim[0], 1 + trim[1]))
        else:
            raise ValueError(
                f"expected the student's map to be as large as the teacher's, larger, or half as large, got "
                f"{tuple(student)} for {tuple(teacher)}; choose a stage of the student that is less deep"
            )
        layers = [convolution, nn.BatchNorm2d(outputs)]
        return nn.Sequential(*layers, *([nn.ReLU()] if self.relu else []))

    def _stage(self, stage: int, student: Tensor, teacher: Tensor) -> Tensor:
        # Not pooled: the regressor itself brings the student's map to the teacher's size.
        s, t = _features.maps(student, teacher, pooled=False)
        return maps.fitnet_loss(through(self.regressors[stage], s), t)


@dataclass(eq=False, repr=False, kw_only=True)
class VIDLoss(FeatureLoss):
    """Module of `luce.vid_loss`, with its mean and its variances, summed over the stages. Its weight is 1.

    As in the benchmark code: the mean comes from the student's map through three 1x1 convolutions with ReLUs
    between, as wide as the teacher; each channel has a variance ``softplus(a) + 1e-5``. The variances are
    parameters and must be trained. In mdistiller they never reach the optimiser and keep their initial value,
    which makes the loss a plain mean-square error.

    Args:
        initial_variance: Above 1e-5; where all variances start.
    """

    takes = "maps"

    initial_variance: float = 5.0

    def _check_options(self) -> None:
        checks.check_between(EPS, math.inf, initial_variance=self.initial_variance)

    def _make(self, student_shapes: Shapes, teacher_shapes: Shapes) -> None:
        pairs = channels(student_shapes, teacher_shapes)
        self.regressors = nn.ModuleList([_three_convolutions(s, t) for s, t in pairs])
        start = self.initial_variance - EPS
        # log(expm1(start)) would overflow a float above 709.
        raw = start + math.log(-math.expm1(-start))  # the inverse of softplus
        self.raw_variances = nn.ParameterList([torch.full((t,), raw) for _, t in pairs])
        self._try(student_shapes, teacher_shapes)

    def variance(self, stage: int) -> Tensor:
        """Return the variance of the prediction of each of the teacher's channels, ``(C',)``."""
        # In float32 softplus is 0 below -104, and the loss divides by the variance.
        return F.softplus(self.raw_variances[stage]) + EPS

    def _stage(self, stage: int, student: Tensor, teacher: Tensor) -> Tensor:
        s, t = _features.maps(student, teacher)
        return maps.vid_loss(through(self.regressors[stage], s), t, variance=self.variance(stage))


EPS = 1e-5
"""Added to the variances of VID."""


def _three_convolutions(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 1, bias=False),
        nn.ReLU(),
        nn.Conv2d(outputs, outputs, 1, bias=False),
        nn.ReLU(),
        nn.Conv2d(outputs, outputs, 1, bias=False),
    )


@dataclass(eq=False, repr=False, kw_only=True)
class FSPLoss(FeatureLoss):
    """Module of `luce.fsp_loss`, on the input and the output of each stage in turn. Its weight is 50.

    Where the channels differ, a 1x1 convolution projects the student's. That is our addition: paper and
    benchmark code require equal channels.
    """

    takes = "maps"
    stages = "pairs"

    def _make(self, student_shapes: Shapes, teacher_shapes: Shapes) -> None:
        self.projectors = nn.ModuleList([aligned(s, t) for s, t in channels(student_shapes, teacher_shapes)])
        self._try(student_shapes, teacher_shapes)

    def forward(self, student_features: Tensors, teacher_features: Tensors) -> Tensor:
        """The loss of a batch, a scalar, from input, output, input, output, ..."""
        self._check_number(len(student_features), len(teacher_features))
        self._check_built()
        pairs = [
            _features.maps(s, t, pooled=False)
            for s, t in zip(student_features, teacher_features, strict=True)
        ]
        s = [through(layer, s) for layer, (s, _) in zip(self.projectors, pairs, strict=True)]
        t = [t for _, t in pairs]
        ends = range(0, len(pairs), 2)
        return torch.stack([maps.fsp_loss((s[i], s[i + 1]), (t[i], t[i + 1])) for i in ends]).sum()


@dataclass(eq=False, repr=False, kw_only=True)
class CWDLoss(FeatureLoss):
    """Module of `luce.cwd_loss`: channel-wise distillation, summed over the stages.

    Where the channels differ, a 1x1 convolution projects the student's.
    """

    takes = "maps"

    temperature: float = 1.0

    def _check_options(self) -> None:
        checks.check_positive(temperature=self.temperature)

    def _make(self, student_shapes: Shapes, teacher_shapes: Shapes) -> None:
        self.projectors = nn.ModuleList([aligned(s, t) for s, t in channels(student_shapes, teacher_shapes)])
        self._try(student_shapes, teacher_shapes)

    def _stage(self, stage: int, student: Tensor, teacher: Tensor) -> Tensor:
        s, t = _features.maps(student, teacher)
        return maps.cwd_loss(through(self.projectors[stage], s), t, temperature=self.temperature)


@dataclass(eq=False, repr=False, kw_only=True)
class ICKDLoss(FeatureLoss):
    """Module of `luce.ickd_loss`, summed over the stages. Its weight is 2.5.

    As in the authors' code, the student's map always goes through a 1x1 convolution to the teacher's channels
    and batch normalisation.
    """

    takes = "maps"

    def _make(self, student_shapes: Shapes, teacher_shapes: Shapes) -> None:
        pairs = channels(student_shapes, teacher_shapes)
        self.projectors = nn.ModuleList([convolution_and_norm(s, t) for s, t in pairs])
        self._try(student_shapes, teacher_shapes)

    def _stage(self, stage: int, student: Tensor, teacher: Tensor) -> Tensor:
        s, t = _features.maps(student, teacher, pooled=False)
        return maps.ickd_loss(through(self.projectors[stage], s), t)


@dataclass(eq=False, repr=False, kw_only=True)
class OFDLoss(FeatureLoss):
    """Module of `luce.ofd_loss`, with the student's projection and the teacher's margins. Weight 0.001.

    As in the authors' code, the student's map goes through a 1x1 convolution and batch normalisation, and the
    last stage counts in full, the one before it half, and so on. Take the features before the activation.

    The margin of a channel is the mean of the teacher's negative values there. The authors' code works it out
    from the weight and bias of the batch normalisation before the ReLU, taking its output to be normal, and
    as -3 standard deviations where that is hardly ever negative. Here it is the mean over all batches seen in
    training mode, the current one included, in buffers that are saved with the loss. So it is exact for any
    teacher and settles within the first batches. With several processes each one averages over its own rows.
    A channel that was never negative has the margin 0.
    """

    takes = "maps"

    def _make(self, student_shapes: Shapes, teacher_shapes: Shapes) -> None:
        pairs = channels(student_shapes, teacher_shapes)
        self.projectors = nn.ModuleList([convolution_and_norm(s, t) for s, t in pairs])
        self.margins = nn.ModuleList([Margin(t) for _, t in pairs])
        self._try(student_shapes, teacher_shapes)

    def _stage(self, stage: int, student: Tensor, teacher: Tensor) -> Tensor:
        return self._distance(stage, *self._connected(stage, student, teacher))

    def _connected(self, stage: int, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The student's projected map, the teacher's at the same size, and the margins."""
        # Margins come from the whole map: pooling would mix negative values with positive ones.
        _, whole = _features.maps(student, teacher, pooled=False)
        margin = self.margins[stage](whole)
        s, t = _features.maps(student, teacher)
        return through(self.projectors[stage], s), t, margin

    def _distance(self, stage: int, student: Tensor, teacher: Tensor, margin: Tensor) -> Tensor:
        loss = maps.ofd_loss(student, teacher, margin=margin)
        return loss / 2 ** (len(self.projectors) - 1 - stage)


class Margin(nn.Module):
    """The mean of the negative values of each channel, over all maps seen in training mode.

    The ratio of two running means: of the negative part and of the share of negative values. Sums and counts
    would lose digits in float32 as they grow.
    """

    batches: Tensor
    negative: Tensor
    share: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("batches", torch.zeros((), dtype=torch.long))
        self.register_buffer("negative", torch.zeros(channels))
        self.register_buffer("share", torch.zeros(channels))

    @torch.no_grad()
    def forward(self, feature: Tensor) -> Tensor:
        """Return the margins ``(C',)``; in training mode after updating the means with a map."""
        if self.training:
            # First: the means below divide by the number of batches, this one included.
            self.batches += 1
            self.negative += (feature.clamp(max=0).mean((0, 2, 3)) - self.negative) / self.batches
            self.share += ((feature < 0).to(feature.dtype).mean((0, 2, 3)) - self.share) / self.batches
        # A channel that was never negative: 0 / 1 is 0, where 0 / 0 would be NaN.
        return self.negative / torch.where(self.share == 0, 1, self.share)


def convolution_and_norm(inputs: int, outputs: int) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, 1, bias=False)
    nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs))


@dataclass(eq=False, repr=False, kw_only=True)
class MGDLoss(FeatureLoss):
    """Module of `luce.mgd_loss`, with the block that generates the teacher's map, summed over the stages.

    As in the authors' code: a 1x1 convolution where the channels differ, before the mask; the block is two
    3x3 convolutions with a ReLU between. Its weight is 7e-5 with masked channels, 2e-5 with masked places. On
    tokens the block mixes neighbours in the order of the tokens only; reshape them to a map instead.
    """

    takes = "maps"

    mask_ratio: float = 0.15
    masked: Literal["channels", "places"] = "channels"

    def _check_options(self) -> None:
        one = torch.zeros(1, 1, 1, 1)
        maps.mgd_loss(one, one, generate=nn.Identity(), **self.options())

    def _make(self, student_shapes: Shapes, teacher_shapes: Shapes) -> None:
        pairs = channels(student_shapes, teacher_shapes)
        self.projectors = nn.ModuleList([aligned(s, t) for s, t in pairs])
        self.generators = nn.ModuleList([_generator(t) for _, t in pairs])
        self._try(student_shapes, teacher_shapes)

    def _stage(self, stage: int, student: Tensor, teacher: Tensor) -> Tensor:
        s, t = _features.maps(student, teacher)

        def generate(masked: Tensor) -> Tensor:
            return through(self.generators[stage], masked)

        return maps.mgd_loss(through(self.projectors[stage], s), t, generate=generate, **self.options())


def _generator(channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU(), nn.Conv2d(channels, channels, 3, padding=1)
    )
