"""Wide residual networks.

References:
    Zagoruyko and Komodakis, Wide Residual Networks, BMVC 2016.
"""

from __future__ import annotations

from torch import Tensor, nn

from .network import Network, chains, image_channels


def bn_relu(channels: int) -> nn.Sequential:
    return nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU())


class PreActivationBlock(nn.Module):
    """Normalisation and ReLU before each of two 3x3 convolutions; nothing after the sum.

    If the width changes, the shortcut starts after the first activation; otherwise it is the input.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.preactivation = bn_relu(inputs)
        self.residual = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
            bn_relu(outputs),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
        )
        self.shortcut = None if inputs == outputs else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        activated = self.preactivation(x)
        shortcut = x if self.shortcut is None else self.shortcut(activated)
        out: Tensor = self.residual(activated) + shortcut
        return out


def wide_resnet(depth: int, factor: int, /, *, classes: int, input_shape: tuple[int, ...]) -> Network:
    """Build three stages of widths 16, 32 and 64 times ``factor``; ``depth`` is 6n + 4."""
    widths = (16, 16 * factor, 32 * factor, 64 * factor)
    blocks = (depth - 4) // 6
    return Network(
        stem=nn.Conv2d(image_channels(input_shape), widths[0], 3, 1, 1, bias=False),
        stages=chains(PreActivationBlock, widths, depths=[blocks] * 3, strides=[1, 2, 2]),
        neck=bn_relu(widths[-1]),
        features=widths[-1],
        classes=classes,
    )
