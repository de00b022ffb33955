"""SimKD's student: a network whose projected feature map feeds the teacher's classifier."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UserError
from .network import Network, conv_bn


def simkd(student: Network, teacher: Network, *, input_shape: tuple[int, ...], factor: int = 2) -> Network:
    """Build a student with the pooling and classifier of its teacher, for `luce.SimKDLoss`.

    The ``neck`` is that of the student followed by a `Projector`; ``pool`` and ``head`` have the teacher's
    architecture. Parameter counts, evaluation and export include the projector and the teacher's classifier.

    Args:
        student: Network that provides stem, stages and neck.
        teacher: Network that provides the architecture of pooling and head; its weights are not used.
        input_shape: Shape of one example.
        factor: Ratio of the teacher's channels to the hidden channels of the projector.

    Raises:
        UserError: If a network has no map before its pooling, or ``factor`` does not divide the teacher's
            channels.
    """
    own, target = (_map_shape(network, input_shape) for network in (student, teacher))
    if len(own) != 3 or len(target) != 3:
        raise UserError(
            "expected networks with maps before their pooling for SimKD, got features of shape "
            f"{tuple(own)} of the student and {tuple(target)} of the teacher"
        )
    if type(factor) is not int or factor < 1 or target[0] % factor:
        raise UserError(f"expected `factor` to divide the teacher's {target[0]} channels, got {factor!r}")
    projector = Projector(own[0], target[0], (target[1], target[2]), factor)
    return Network(
        stem=student.stem,
        stages=student.stages,
        neck=nn.Sequential(student.neck, projector),
        pool=teacher.pool,
        features=teacher.head.in_features,
        classes=teacher.head.out_features,
    )


class Projector(nn.Module):
    """1x1, 3x3 and 1x1 convolutions to the teacher's channels, each with batch normalisation and a ReLU.

    Average pooling first reduces a map that is larger than the teacher's.
    """

    def __init__(self, inputs: int, outputs: int, size: tuple[int, int], factor: int) -> None:
        super().__init__()
        middle = outputs // factor
        self.size = size
        self.layers = nn.Sequential(
            conv_bn(inputs, middle, 1), conv_bn(middle, middle, 3), conv_bn(middle, outputs, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        height, width = (min(own, other) for own, other in zip(x.shape[-2:], self.size, strict=True))
        if (height, width) != x.shape[-2:]:
            x = F.adaptive_avg_pool2d(x, (height, width))
        projected: Tensor = self.layers(x)
        return projected


@torch.no_grad()
def _map_shape(network: Network, input_shape: tuple[int, ...]) -> torch.Size:
    """Return the shape of the map before pooling, for one row."""
    network.eval()
    shape: torch.Size = network.neck(network.stages(network.stem(torch.zeros(1, *input_shape)))).shape[1:]
    network.train()
    return shape
