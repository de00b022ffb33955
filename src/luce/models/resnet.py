"""Residual networks for small images.

References:
    He et al., Deep Residual Learning for Image Recognition, CVPR 2016.
"""

from __future__ import annotations

from torch import Tensor, nn

from .network import Network, chains, conv_bn, image_channels


class ResidualBlock(nn.Module):
    """``relu(residual(x) + shortcut(x))``; the input of ``act`` is the feature before its activation."""

    def __init__(self, residual: nn.Module, shortcut: nn.Module) -> None:
        super().__init__()
        self.residual = residual
        self.shortcut = shortcut
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.act(self.residual(x) + self.shortcut(x))
        return out


def projection(inputs: int, outputs: int, stride: int) -> nn.Module:
    """Return the shortcut: the identity if the shapes match, else a 1x1 convolution."""
    if inputs == outputs and stride == 1:
        return nn.Identity()
    return conv_bn(inputs, outputs, 1, stride=stride, relu=False)


def basic_block(inputs: int, outputs: int, stride: int) -> ResidualBlock:
    """Build a block of two 3x3 convolutions."""
    residual = nn.Sequential(
        conv_bn(inputs, outputs, 3, stride=stride),
        conv_bn(outputs, outputs, 3, relu=False),
    )
    return ResidualBlock(residual, projection(inputs, outputs, stride))


def bottleneck(inputs: int, outputs: int, stride: int) -> ResidualBlock:
    """Build a block of a 3x3 convolution at a quarter of the width between two 1x1 convolutions."""
    middle = outputs // 4
    residual = nn.Sequential(
        conv_bn(inputs, middle, 1),
        conv_bn(middle, middle, 3, stride=stride),
        conv_bn(middle, outputs, 1, relu=False),
    )
    return ResidualBlock(residual, projection(inputs, outputs, stride))


def resnet(
    depth: int, widths: tuple[int, int, int, int], /, *, classes: int, input_shape: tuple[int, ...]
) -> Network:
    """Build three stages of basic blocks; ``depth`` is 6n + 2, ``widths`` are those of stem and stages."""
    blocks = (depth - 2) // 6
    return Network(
        stem=conv_bn(image_channels(input_shape), widths[0], 3),
        stages=chains(basic_block, widths, depths=[blocks] * 3, strides=[1, 2, 2]),
        features=widths[-1],
        classes=classes,
    )


def resnet50(*, classes: int, input_shape: tuple[int, ...]) -> Network:
    """Build ResNet-50 with a 3x3 stem of stride 1 in place of ImageNet's 7x7 stem and pooling."""
    widths = (64, 256, 512, 1024, 2048)
    return Network(
        stem=conv_bn(image_channels(input_shape), widths[0], 3),
        stages=chains(bottleneck, widths, depths=[3, 4, 6, 3], strides=[1, 2, 2, 2]),
        features=widths[-1],
        classes=classes,
    )
