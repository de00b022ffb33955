"""VGG for spiking networks: average pooling before the activation, no bias, no normalisation.

References:
    Lu and Sengupta, Exploring the Connection Between Binary and Spiking Neural Networks, Frontiers in
    Neuroscience 14:535, 2020.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from torch import nn

from ..errors import UserError
from .network import Network, image_channels, positive_integers


def vgg_pool(
    *,
    classes: int,
    input_shape: tuple[int, ...],
    widths: Sequence[int] = (64, 128, 256, 512, 512),
    blocks: Sequence[int] | None = None,
    hidden: Sequence[int] = (),
    dropout: float = 0.1,
) -> Network:
    """Build blocks of 3x3 convolutions; average pooling halves the output of each block before its last ReLU.

    The paper's VGG-15 has ``blocks=[2, 2, 3, 3, 3]`` and ``hidden=[4096]``.

    Args:
        widths: Channels of each block; the first block is the stem, the others are stages.
        blocks: Number of convolutions in each block; None for one.
        hidden: Widths of the linear layers between the map and the head.
        dropout: Dropout rate after every ReLU except those after a pooling, and before the linear layers.
    """
    widths = positive_integers("widths", widths)
    depths = positive_integers("blocks", [1] * len(widths) if blocks is None else blocks)
    hidden = positive_integers("hidden", hidden, may_be_empty=True)
    if len(depths) != len(widths):
        raise UserError(f"expected as many `blocks` as `widths`, {len(widths)}, got {list(depths)}")
    if not 0 <= dropout < 1:
        raise UserError(f"expected `dropout` in [0, 1), got {dropout}")
    sides = list(input_shape[1:])
    parts: list[nn.Module] = []
    for (inputs, outputs), depth in zip(
        pairwise((image_channels(input_shape), *widths)), depths, strict=True
    ):
        layers: list[nn.Module] = []
        for index in range(depth):
            layers.append(nn.Conv2d(outputs if index else inputs, outputs, 3, padding=1, bias=False))
            if index < depth - 1:
                layers += [nn.ReLU(), nn.Dropout(dropout)]
        if min(sides) > 1:  # a side of one pixel cannot be halved
            layers.append(nn.AvgPool2d(2))
            sides = [side // 2 for side in sides]
        parts.append(nn.Sequential(*layers, nn.ReLU()))
    features = [widths[-1] * math.prod(sides), *hidden]
    linear: list[nn.Module] = []
    for inputs, outputs in pairwise(features):
        layer = nn.Linear(inputs, outputs, bias=False)
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        linear += [layer, nn.ReLU(), nn.Dropout(dropout)]
    network = Network(
        stem=parts[0],
        stages=parts[1:],
        pool=nn.Sequential(nn.Flatten(), nn.Dropout(dropout), *linear),
        features=features[-1],
        classes=classes,
    )
    network.head = nn.Linear(features[-1], classes, bias=False)
    return network
