"""ShuffleNet, both versions, for small images: the stem is a 1x1 convolution that keeps the resolution.

References:
    Zhang et al., ShuffleNet: An Extremely Efficient Convolutional Neural Network for Mobile Devices,
    CVPR 2018.
    Ma et al., ShuffleNet V2: Practical Guidelines for Efficient CNN Architecture Design, ECCV 2018.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .network import Network, chains, conv_bn, image_channels

STEM = 24
GROUPS = 3


class GroupedUnit(nn.Module):
    """ShuffleNet's unit: grouped 1x1, shuffle, depthwise 3x3, grouped 1x1.

    At stride 2 the branch and the pooled input are concatenated, and the branch supplies the missing
    channels; at stride 1 they are added.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        new = outputs - inputs if stride == 2 else outputs
        middle = new // 4
        # The stem has too few channels for groups in the next layer (section 3.2 of the paper).
        groups = 1 if inputs == STEM else GROUPS
        self.branch = nn.Sequential(
            conv_bn(inputs, middle, 1, groups=groups),
            nn.ChannelShuffle(groups),
            conv_bn(middle, middle, 3, stride=stride, groups=middle),
            conv_bn(middle, new, 1, groups=GROUPS, relu=False),
        )
        self.shortcut = nn.AvgPool2d(3, stride=2, padding=1) if stride == 2 else None
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        branch = self.branch(x)
        out = branch + x if self.shortcut is None else torch.cat([branch, self.shortcut(x)], dim=1)
        activated: Tensor = self.act(out)
        return activated


def branch(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    """Build a branch of ShuffleNet V2: 1x1, depthwise 3x3, 1x1."""
    return nn.Sequential(
        conv_bn(inputs, outputs, 1),
        conv_bn(outputs, outputs, 3, stride=stride, groups=outputs, relu=False),
        conv_bn(outputs, outputs, 1),
    )


class SplitUnit(nn.Module):
    """ShuffleNet V2's unit at stride 1: half of the channels pass unchanged, half through the branch."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.branch = branch(channels // 2, channels // 2, stride=1)
        self.shuffle = nn.ChannelShuffle(2)

    def forward(self, x: Tensor) -> Tensor:
        kept, changed = x.chunk(2, dim=1)
        out: Tensor = self.shuffle(torch.cat([kept, self.branch(changed)], dim=1))
        return out


class DownUnit(nn.Module):
    """ShuffleNet V2's unit at stride 2: two branches read all channels and each gives half of the output."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        half = outputs // 2
        self.shortcut = nn.Sequential(
            conv_bn(inputs, inputs, 3, stride=2, groups=inputs, relu=False),
            conv_bn(inputs, half, 1),
        )
        self.branch = branch(inputs, half, stride=2)
        self.shuffle = nn.ChannelShuffle(2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.shuffle(torch.cat([self.shortcut(x), self.branch(x)], dim=1))
        return out


def unit_v2(inputs: int, outputs: int, stride: int) -> nn.Module:
    return DownUnit(inputs, outputs) if stride == 2 else SplitUnit(outputs)


def shufflenetv1(*, classes: int, input_shape: tuple[int, ...]) -> Network:
    """Build ShuffleNet with three groups, at full width."""
    widths = (STEM, 240, 480, 960)
    return Network(
        stem=conv_bn(image_channels(input_shape), STEM, 1),
        stages=chains(GroupedUnit, widths, depths=[4, 8, 4], strides=[2, 2, 2]),
        features=widths[-1],
        classes=classes,
    )


def shufflenetv2(*, classes: int, input_shape: tuple[int, ...]) -> Network:
    """Build ShuffleNet V2 at full width."""
    widths = (STEM, 116, 232, 464)
    return Network(
        stem=conv_bn(image_channels(input_shape), STEM, 1),
        stages=chains(unit_v2, widths, depths=[4, 8, 4], strides=[2, 2, 2]),
        neck=conv_bn(widths[-1], 1024, 1),
        features=1024,
        classes=classes,
    )
