"""SimKD's student: a network's map, projected to the teacher's, before the teacher's classifier."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UserError
from .network import Network, conv_bn


def simkd(student: Network, teacher: Network, *, input_shape: tuple[int, ...], factor: int = 2) -> Network:
    """A network that ends as another one does; for `luce.SimKDLoss`.

    Its ``neck`` is that of the student followed by a `Projector`; ``pool`` and ``head`` have the teacher's
    form. It is built, counted, evaluated and exported as what it is: larger than the student alone.

    Args:
        student: Its stem, stages and neck become those of the result.
        teacher: Only its form is wanted.
        input_shape: Of one example.
        factor: By which the projector is narrower than the teacher's map.

    Raises:
        UserError: If one of the two has no map before its pooling, or ``factor`` is no positive divisor of
            the teacher's channels.
    """
    ours, theirs = (_map_shape(network, input_shape) for network in (student, teacher))
    if len(ours) != 3 or len(theirs) != 3:
        raise UserError(
            "expected networks with maps before their pooling for SimKD, got features of shape "
            f"{tuple(ours)} of the student and {tuple(theirs)} of the teacher"
        )
    if type(factor) is not int or factor < 1 or theirs[0] % factor:
        raise UserError(f"expected `factor` to divide the teacher's {theirs[0]} channels, got {factor!r}")
    projector = Projector(ours[0], theirs[0], (theirs[1], theirs[2]), factor)
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

    A map that is larger than the teacher's is brought to its size first, by average pooling.
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
    """Of what is pooled, for one row."""
    network.eval()
    shape: torch.Size = network.neck(network.stages(network.stem(torch.zeros(1, *input_shape)))).shape[1:]
    network.train()
    return shape
