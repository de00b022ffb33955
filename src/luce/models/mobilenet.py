"""MobileNetV2 for small images.

References:
    Sandler et al., MobileNetV2: Inverted Residuals and Linear Bottlenecks, CVPR 2018.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

from .network import Network, chain, conv_bn, image_channels


class InvertedResidual(nn.Module):
    """Expand, filter each channel, project without activation; add the input if the shapes match."""

    def __init__(self, inputs: int, outputs: int, stride: int, *, expansion: int) -> None:
        super().__init__()
        middle = expansion * inputs
        self.residual = nn.Sequential(
            conv_bn(inputs, middle, 1),
            conv_bn(middle, middle, 3, stride=stride, groups=middle),
            conv_bn(middle, outputs, 1, relu=False),
        )
        self.adds_input = inputs == outputs and stride == 1

    def forward(self, x: Tensor) -> Tensor:
        residual: Tensor = self.residual(x)
        return x + residual if self.adds_input else residual


def mobilenetv2(*, classes: int, input_shape: tuple[int, ...]) -> Network:
    """Build MobileNetV2 at half width with expansion 6, as in the distillation literature on CIFAR.

    Compared with the ImageNet network, the second group keeps its resolution, the activation is ReLU, and the
    last 1x1 convolution has its full 1280 channels.
    """
    first = partial(InvertedResidual, expansion=1)
    block = partial(InvertedResidual, expansion=6)
    return Network(
        stem=conv_bn(image_channels(input_shape), 16, 3, stride=2),
        stages=[
            nn.Sequential(chain(first, 16, 8, depth=1, stride=1), chain(block, 8, 12, depth=2, stride=1)),
            chain(block, 12, 16, depth=3, stride=2),
            nn.Sequential(chain(block, 16, 32, depth=4, stride=2), chain(block, 32, 48, depth=3, stride=1)),
            nn.Sequential(chain(block, 48, 80, depth=3, stride=2), chain(block, 80, 160, depth=1, stride=1)),
        ],
        neck=conv_bn(160, 1280, 1),
        features=1280,
        classes=classes,
    )
