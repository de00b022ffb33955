"""Modules of LONDON: its Lipschitz term alone, and on top of OFD."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ... import checks
from .. import _features
from ..functional.lipschitz import ITERATIONS, Algorithm, lipschitz_loss
from .features import FeatureLoss, Shapes, Tensors, channels, through
from .maps import OFDLoss, convolution_and_norm

__all__ = ["LONDONLoss", "LipschitzLoss"]


@dataclass(eq=False, repr=False, kw_only=True)
class LipschitzLoss(FeatureLoss):
    """Module of `luce.lipschitz_loss`: the norms of the transmitting matrices, from each stage to the next.

    Without connectors the loss has no parameters and measures the student's own maps, whatever their
    channels; that form is ours. The authors' code measures them after the connectors of OFD, which exist in
    training only: `luce.LONDONLoss` is the sum of both.

    Args:
        connectors: Whether the student's maps go through a 1x1 convolution to the teacher's channels and
            batch normalisation first, as in OFD.
        relative: Whether each square is divided by the teacher's.
        iterations: Of `luce.losses.spectral_norm`.
        algorithm: Likewise, ``"lanczos"`` or ``"power"``.
    Example:
        >>> loss = LipschitzLoss(relative=True)
        >>> maps = [torch.ones(1, 1, 2, 2), torch.ones(1, 4, 2, 2)]
        >>> loss([3 * x for x in maps], maps)
        tensor(32.)
    """

    takes = "maps"
    stages = "consecutive"

    connectors: bool = False
    relative: bool = False
    iterations: int = ITERATIONS
    algorithm: Algorithm = "lanczos"

    @property
    def learns(self) -> bool:
        return self.connectors

    def _check_options(self) -> None:
        _check_options(self.relative, self.iterations, self.algorithm)

    def _make(self, student_shapes: Shapes, teacher_shapes: Shapes) -> None:
        if self.connectors:
            pairs = channels(student_shapes, teacher_shapes)
            self.projectors = nn.ModuleList([convolution_and_norm(s, t) for s, t in pairs])
        self._try(student_shapes, teacher_shapes)

    def forward(self, student_features: Tensors, teacher_features: Tensors) -> Tensor:
        """The loss of a batch, a scalar, from the maps of the first stage to those of the last."""
        self._check_number(len(student_features), len(teacher_features))
        self._check_built()
        s, t = student_features, teacher_features
        if self.connectors:
            maps = [_features.maps(*pair, pooled=False) for pair in zip(s, t, strict=True)]
            s = [through(layer, s) for layer, (s, _) in zip(self.projectors, maps, strict=True)]
            t = [t for _, t in maps]
        return lipschitz_loss(
            s, t, relative=self.relative, iterations=self.iterations, algorithm=self.algorithm
        )


@dataclass(eq=False, repr=False, kw_only=True)
class LONDONLoss(OFDLoss):
    r"""LONDON: OFD plus the Lipschitz term of each stage, through the same connectors.

    .. math:: L = L_\mathrm{OFD} + \alpha L_\mathrm{lip}

    with `luce.OFDLoss` and, of the connected maps, `luce.lipschitz_loss`. It returns ``{"loss": L, "ofd":
    ..., "lipschitz": ...}``, the last two without weights.

    The formulas and weights are those of the released code. On CIFAR-100 it minimises the cross-entropy plus
    ``L_ofd / 1000 + a * L_lip / 200``: here weight 0.001 and :math:`\alpha = 5 a`, with a from 0.2 to 4 by
    pair, 1 by default (in one setting divided, in another multiplied, after 60 % of the epochs). On ImageNet
    it minimises ``L_ofd / 10000 + 2000 * L_lip / (10000 * batch)``: weight 0.0001 and :math:`\alpha` =
    2000 / batch, about 21 with its batch of 96. It has no term on logits. The Lipschitz term grows with the
    fourth power of the features. A digest of the paper says that the term hurts beyond a fifth of the total
    loss; the two returned parts show that share.

    Outside the formulas it differs from that code. The teacher stays in evaluation mode, where the code lets
    its batch statistics drift. The margins are averaged (see `luce.OFDLoss`). The norms converge and have
    their exact gradient, where the code takes 10 noisy steps of power iteration. The first release of the
    code (July 2021) computed the norms without gradients, so that the term had no effect; it was fixed in
    September, but copies circulate. A test here checks that each part moves the student. The paper itself,
    its bounds and tables were not verified.

    Args:
        lipschitz_weight: :math:`\alpha`, at least 0, of the Lipschitz term.
        relative: Whether each of its squares is divided by the teacher's.
        iterations: Of `luce.losses.spectral_norm`.
        algorithm: Likewise, ``"lanczos"`` or ``"power"``.
    Example:
        >>> loss = LONDONLoss(lipschitz_weight=1.0)
        >>> loss.build([(2, 8, 8), (3, 4, 4)], [(4, 8, 8), (5, 4, 4)])
        >>> student = [torch.randn(2, 2, 8, 8), torch.randn(2, 3, 4, 4)]
        >>> sorted(loss(student, [torch.randn(2, 4, 8, 8), torch.randn(2, 5, 4, 4)]))
        ['lipschitz', 'loss', 'ofd']

    References:
        Shang et al., Lipschitz Continuity Guided Knowledge Distillation, ICCV 2021, arXiv 2108.12905.
    """

    stages = "consecutive"

    lipschitz_weight: float = 5.0
    relative: bool = False
    iterations: int = ITERATIONS
    algorithm: Algorithm = "lanczos"

    def _check_options(self) -> None:
        checks.check_not_negative(lipschitz_weight=self.lipschitz_weight)
        _check_options(self.relative, self.iterations, self.algorithm)

    def forward(self, student_features: Tensors, teacher_features: Tensors) -> dict[str, Tensor]:
        """The loss of a batch and its two parts, scalars."""
        self._check_number(len(student_features), len(teacher_features))
        self._check_built()
        pairs = zip(student_features, teacher_features, strict=True)
        stages = [self._connected(i, s, t) for i, (s, t) in enumerate(pairs)]
        ofd = torch.stack([self._distance(i, *stage) for i, stage in enumerate(stages)]).sum()
        lipschitz = lipschitz_loss(
            [s for s, _, _ in stages],
            [t for _, t, _ in stages],
            relative=self.relative,
            iterations=self.iterations,
            algorithm=self.algorithm,
        )
        return {"loss": ofd + self.lipschitz_weight * lipschitz, "ofd": ofd, "lipschitz": lipschitz}


def _check_options(relative: bool, iterations: int, algorithm: Algorithm) -> None:
    """Check the options by calling the function once; see `FeatureLoss._check_options`."""
    ones = [torch.ones(1, 1, 1, 1)] * 2
    lipschitz_loss(ones, ones, relative=relative, iterations=iterations, algorithm=algorithm)
