"""VGG with batch normalisation and a single linear layer after the convolutions.

References:
    Simonyan and Zisserman, Very Deep Convolutional Networks for Large-Scale Image Recognition, ICLR 2015.
"""

from __future__ import annotations

from torch import nn

from .network import Network, chains, conv_bn, image_channels


def convolution(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    # Normalisation cancels the bias, but without it parameter counts differ from the literature.
    return conv_bn(inputs, outputs, 3, stride=stride, bias=True)


def vgg(depths: tuple[int, int, int, int, int], /, *, classes: int, input_shape: tuple[int, ...]) -> Network:
    """Build five groups of 3x3 convolutions, the first being the stem; ``depths`` are their sizes.

    The map is halved before every stage, before the last one only for images of at least 64 pixels: images of
    32 pixels are classified from a 4x4 map, as in the literature.
    """
    channels = image_channels(input_shape, least=8)
    stem, *stages = chains(convolution, (channels, 64, 128, 256, 512, 512), depths, strides=[1] * 5)
    for stage in stages if min(input_shape[1:]) >= 64 else stages[:-1]:
        stage.insert(0, nn.MaxPool2d(2))
    return Network(stem=stem, stages=stages, features=512, classes=classes)
