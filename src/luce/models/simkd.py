"""SimKD's student: a network's map, projected to the teacher's, before the teacher's classifier."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from luce.errors import UserError
from luce.models.network import Network, conv_bn


def simkd(name: str, options: Mapping[str, Any], *, classes: int, input_shape: tuple[int, ...]) -> Network:
    """A native network that ends as another one does; for `luce.methods.SimKD`.

    Its ``neck`` is that of the network ``name`` followed by a `Projector`; ``pool`` and ``head`` have the
    teacher's form. It is built, counted, evaluated and exported as what it is: larger than ``name`` alone.

    Args:
        name: Of the native network.
        options: Those of the network and

            - ``teacher``, the name of the native network that the teacher is,
            - ``teacher_options``, its options,
            - ``factor``, by which the projector is narrower than the teacher's map, 2 unless given.
        classes: Number of classes.
        input_shape: Of one example.

    Raises:
        UserError: If one of the two is no native network with a map before its pooling, or ``factor`` is no
            positive divisor.
    """
    from luce.models.registry import build, names  # which knows this function

    rest = dict(options)
    teacher_name, factor = rest.pop("teacher", None), rest.pop("factor", 2)
    teacher_options = rest.pop("teacher_options", {})
    for which in (name, teacher_name):
        if which not in names():
            raise UserError(
                f"expected `simkd:STUDENT` with `teacher` among its options, both names of native networks, "
                f"got `{which}`"
            )
    student = build(name, classes=classes, input_shape=input_shape, **rest)
    with torch.random.fork_rng([]):  # only its form is wanted
        teacher = build(teacher_name, classes=classes, input_shape=input_shape, **teacher_options)
    assert isinstance(student, Network)
    assert isinstance(teacher, Network)
    ours, theirs = (_map_shape(network, input_shape) for network in (student, teacher))
    if len(ours) != 3 or len(theirs) != 3:
        raise UserError(
            f"expected networks with maps before their pooling for SimKD, got `{name}` with features of "
            f"shape {tuple(ours)} and `{teacher_name}` with {tuple(theirs)}"
        )
    if type(factor) is not int or factor < 1 or theirs[0] % factor:
        raise UserError(f"expected `factor` to divide the teacher's {theirs[0]} channels, got {factor!r}")
    projector = Projector(ours[0], theirs[0], (theirs[1], theirs[2]), factor)
    network = Network(
        stem=student.stem,
        stages=student.stages,
        neck=nn.Sequential(student.neck, projector),
        pool=teacher.pool,
        features=teacher.head.in_features,
        classes=classes,
    )
    return network


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
