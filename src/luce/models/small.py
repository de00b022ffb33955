"""Networks that train in seconds on a laptop."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from torch import nn

from .network import Network, conv_bn, image_channels, positive_integers


def mlp(*, classes: int, input_shape: tuple[int, ...], hidden: Sequence[int] = (128,)) -> Network:
    """Build fully connected layers with ReLU over the flattened input, one stage each.

    Args:
        hidden: Widths of the hidden layers; an empty list gives a linear classifier.
    """
    widths = (math.prod(input_shape), *positive_integers("hidden", hidden, may_be_empty=True))
    return Network(
        stem=nn.Flatten(),
        stages=[nn.Sequential(nn.Linear(inputs, outputs), nn.ReLU()) for inputs, outputs in pairwise(widths)],
        pool=nn.Identity(),
        features=widths[-1],
        classes=classes,
    )


def cnn(*, classes: int, input_shape: tuple[int, ...], widths: Sequence[int] = (32, 64)) -> Network:
    """Build 3x3 convolutions, each at half the resolution of the previous one down to one pixel.

    Args:
        widths: Channels of the convolutions; the first is the stem, the others are stages.
    """
    channels = image_channels(input_shape)
    widths = positive_integers("widths", widths)
    size = min(input_shape[1:])
    stages = []
    for inputs, outputs in pairwise(widths):
        halve: list[nn.Module] = [nn.MaxPool2d(2)] if size > 1 else []
        stages.append(nn.Sequential(*halve, *conv_bn(inputs, outputs, 3)))
        size //= 2
    return Network(stem=conv_bn(channels, widths[0], 3), stages=stages, features=widths[-1], classes=classes)


def conv_stride(*, classes: int, input_shape: tuple[int, ...]) -> Network:
    """Build two 3x3 convolutions of stride 2 and a linear layer over the whole map.

    A minimal convolutional student for quick studies and small hardware: 9,122 parameters on 28x28.
    """
    channels = image_channels(input_shape)
    positions = math.prod(math.ceil(side / 4) for side in input_shape[1:])
    return Network(
        stem=conv_bn(channels, 8, 3, stride=2),
        stages=[conv_bn(8, 16, 3, stride=2)],
        pool=nn.Flatten(),
        features=16 * positions,
        classes=classes,
    )
